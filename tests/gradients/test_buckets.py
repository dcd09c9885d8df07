"""Gradients are sorted into buckets; unsupported gradients raise before anything is changed."""

import re

import pytest
import torch
import torch.distributed as dist

from fastguard.gradients.buckets import bucketize, gradients_of
from guardtest.gloo_groups import group_of_one
from guardtest.grads import parameters

CPU = torch.device("cpu")


def test_no_gradient_at_all():
    for grads in ([], [None, None]):
        buckets = bucketize(grads)
        assert (buckets.buckets, buckets.n_tensors, buckets.device) == ((), len(grads), CPU)
        assert not buckets.float64


def test_one_bucket_holds_the_callers_own_tensors():
    grads = [torch.ones(2), torch.ones(3, 3)]
    (bucket,) = bucketize(grads).buckets
    assert all(mine is theirs for mine, theirs in zip(bucket.grads, grads, strict=True))
    assert (bucket.device, bucket.dtype) == (CPU, torch.float32)
    assert list(bucket.tensor_ids) == [0, 1]
    assert list(bucket.segment_ids) == [0, 0]
    assert bucket.segment == 0


def test_gradients_after_a_missing_one_keep_their_numbers():
    grads = [None, torch.ones(2), None, torch.ones(3)]
    buckets = bucketize(grads, segments=[5, 1, 7, 0], n_segments=8)
    (bucket,) = buckets.buckets
    assert buckets.n_tensors == 4
    assert list(bucket.tensor_ids) == [1, 3]
    assert list(bucket.segment_ids) == [1, 0]
    assert bucket.segment is None


def test_one_bucket_per_dtype_in_order_of_appearance():
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64]
    buckets = bucketize([torch.ones(1, dtype=d) for d in dtypes], segments=[0, 1, 0, 1])
    assert [b.dtype for b in buckets.buckets] == [torch.bfloat16, torch.float32, torch.float64]
    assert [list(b.tensor_ids) for b in buckets.buckets] == [[0, 2], [1], [3]]
    assert [b.segment for b in buckets.buckets] == [0, 1, 1]
    assert buckets.float64


def test_results_are_on_the_requested_device_or_that_of_the_first_gradient():
    meta = torch.device("meta")  # a second device that every machine has
    grads = [torch.ones(2), torch.ones(2, dtype=torch.float64, device=meta)]
    assert bucketize(grads).device == torch.device("cpu")
    assert bucketize(grads[::-1]).device == meta
    assert bucketize(grads[:1], device=meta).device == meta
    assert bucketize(grads[::-1], device=torch.device("cpu")).device == torch.device("cpu")


def test_missing_gradients_and_several_dtypes_together():
    grads = [None, torch.ones(1), torch.ones(1).half(), None, torch.ones(1)]
    buckets = bucketize(grads, segments=range(5), n_segments=5)
    assert [list(b.tensor_ids) for b in buckets.buckets] == [[1, 4], [2]]
    assert [list(b.segment_ids) for b in buckets.buckets] == [[1, 4], [2]]


def test_segment_ids_that_are_all_zero_behave_like_a_list():
    (bucket,) = bucketize([torch.ones(1)] * 3).buckets
    same = bucket.segment_ids
    assert (len(same), list(same), same[1:], same[-1]) == (3, [0, 0, 0], [0, 0], 0)
    for i in (3, -4):
        with pytest.raises(IndexError):
            same[i]


def test_a_complex_gradient_is_its_real_view():
    grad = torch.tensor([3 + 4j, 1 - 1j])
    (bucket,) = bucketize([grad]).buckets
    assert bucket.dtype is torch.float32
    bucket.grads[0].mul_(2)
    assert grad.tolist() == [6 + 8j, 2 - 2j]


def test_a_copy_stands_for_a_lazily_conjugated_gradient_and_is_written_back():
    memory = torch.tensor([3 + 4j])
    (bucket,) = bucketize([memory.conj()]).buckets
    assert bucket.grads[0].tolist() == [[3, -4]]
    bucket.grads[0].mul_(2)
    bucket.write_back()
    assert memory.tolist() == [6 + 8j]


def test_kernels_never_read_memory_with_a_negative_bit():
    """The bit is part of the layout, so a recognized layout does not hide it."""
    for _ in range(2):
        grads = [torch._neg_view(torch.ones(2, device="meta")) for _ in range(40)]
        (bucket,) = bucketize(grads).buckets
        assert not any(g.is_neg() for g in bucket.grads) and len(bucket.resolved) == 40


@pytest.mark.parametrize("norm_type", [1.0, 3.5, float("inf")])
def test_complex_gradients_have_the_2_norm_only(norm_type):
    with pytest.raises(
        TypeError, match=r"parameter 1 is complex and norm_type is .* use norm_type=2"
    ):
        bucketize([torch.ones(2), torch.ones(2, dtype=torch.complex64)], norm_type=norm_type)


REFUSED = {
    "int64": (lambda: torch.ones(2, dtype=torch.int64), "int64"),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), "bool"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "coo": (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), "sparse_csr"),
    "a string": (lambda: "grad", "str"),
    "a float": (lambda: 1.0, "float"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_gradients_that_cannot_be_measured_are_an_error_anywhere(place, kind):
    make, word = REFUSED[kind]
    grads = [torch.ones(2), None, torch.ones(3), torch.ones(2).half()]
    grads[place] = make()
    with pytest.raises(TypeError, match=word):
        bucketize(grads)


@pytest.mark.parametrize("kind", ["int64", "coo"])
def test_a_refusal_names_the_parameter_and_the_remedy(kind):
    bad = REFUSED[kind][0]()
    with pytest.raises(TypeError, match=r"emb\.weight.*(leave this tensor out|use sparse=False)"):
        bucketize([None, torch.ones(1), bad], names=["a", "b", "emb.weight"])
    with pytest.raises(TypeError, match="parameter 2"):
        bucketize([None, torch.ones(1), bad])


def test_a_dtensor_is_measured_by_its_local_part():
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    with group_of_one():
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
        (bucket,) = bucketize([torch.ones(1), sharded]).buckets
        assert bucket.grads[1] is sharded._local_tensor


# Values that users pass as parameters.


def test_gradients_of_tensors():
    a, b = parameters(torch.ones(2), None)
    assert gradients_of(a) == ([a.grad], None)
    assert gradients_of([a, b]) == ([a.grad, None], None)
    assert gradients_of(iter((a, b))) == ([a.grad, None], None)
    assert gradients_of([]) == ([], None)


def test_gradients_of_named_tensors():
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    grads, names = gradients_of(model.named_parameters())
    assert grads[0] is model.weight.grad and grads[1] is None
    assert names == ["weight", "bias"]


A, B = parameters(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    ("items", "wrong"),
    {
        "a string": ([A, "b"], "str"),
        "None": ([None], "NoneType"),
        "param groups": ([{"params": [A]}], "dict"),
        "modules": ([torch.nn.Linear(1, 1)], "Linear"),
        "a pair among tensors": ([A, ("b", B)], "tuple"),
        "a tensor among pairs": ([("a", A), B], "Parameter"),
        "a triple": ([("a", A, 1)], "tuple"),
        "a pair without a tensor": ([("a", A), ("b", 3)], "tuple"),
    }.values(),
)
def test_other_values_are_an_error_with_their_type(items, wrong):
    with pytest.raises(
        TypeError, match=f"(?s)one is a {wrong}: .*{re.escape('model.parameters()')}"
    ):
        gradients_of(items)
