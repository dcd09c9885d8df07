"""Stage 4: gradients are scaled and cleaned as the verdict says, and otherwise unchanged."""

import math

import pytest
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket, GradBuckets, Run, bucketize
from fastguard.gradients.tensor_kinds import PLAIN
from fastguard.stages import backend, reference
from fastguard.stages.apply import apply, scale
from fastguard.stages.contract import Policy, Signals
from fastguard.stages.decide import decide
from fastguard.stages.measure import measure
from guardtest.grads import DTYPES, assert_bitwise_equal

NAN, INF = math.nan, math.inf
NO, YES = torch.zeros(()), torch.ones(())


def factor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=["cpu", "plain"])
def each_backend(request, monkeypatch):
    """The CPU backend, which reads the verdict, and the reference for devices without kernels."""
    if request.param == "plain":
        monkeypatch.setattr(backend, "stages", lambda device, kind=PLAIN: reference)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [0.3, 1e-3, 1 / 1024])
def test_the_multiplier_is_not_rounded_to_16_bits(dtype, multiplier):
    grads = [torch.randn(n).to(DTYPES[dtype]) for n in (1, 7, 300)]
    expected = [g.double() * multiplier for g in grads]
    scale(bucketize(grads), factor(multiplier), NO)
    info = torch.finfo(DTYPES[dtype])
    # The result is rounded once; multiplier and product are float32, or float64.
    rtol = info.eps / 2 + 2 * min(info.eps, torch.finfo(torch.float32).eps)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=info.tiny * info.eps)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_multiplier_of_one_changes_no_bit(dtype):
    grad = torch.tensor([1.0, -0.0, NAN, INF, 6e-8, -3.3]).to(DTYPES[dtype])
    before = grad.clone()
    scale(bucketize([grad]), factor(1.0), NO)
    assert_bitwise_equal(grad, before)


def test_a_multiplier_of_one_does_not_write_to_memory():
    grads = [torch.ones(3), torch.ones(4)]
    scale(bucketize(grads, segments=[0, 1], n_segments=2), factor(1.0, 0.5), NO)
    assert [g._version for g in grads] == [0, 1]


@pytest.mark.usefixtures("each_backend")
def test_each_segment_has_its_multiplier():
    grads = [torch.ones(2), None, torch.ones(2).half(), torch.ones(2)]
    buckets = bucketize(grads, segments=[0, 1, 2, 1], n_segments=3)
    scale(buckets, factor(0.5, 0.25, 1.0), NO)
    assert [g.tolist() for g in grads if g is not None] == [[0.5] * 2, [1.0] * 2, [0.25] * 2]


@pytest.mark.usefixtures("each_backend")
def test_one_multiplier_applies_to_all_segments():
    grads = [torch.ones(2), torch.ones(2)]
    scale(bucketize(grads, segments=[0, 1], n_segments=2), factor(0.5), NO)
    assert [g.tolist() for g in grads] == [[0.5] * 2] * 2


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0])
def test_cleaning_replaces_and_never_multiplies_nan(dtype, multiplier):
    grad = torch.tensor([2.0, NAN, INF, -INF, -4.0]).to(DTYPES[dtype])
    scale(bucketize([grad]), factor(multiplier), YES)
    assert grad.tolist() == [2.0 * multiplier, 0.0, 0.0, 0.0, -4.0 * multiplier]


def test_after_measuring_only_the_bad_tensors_are_cleaned():
    buckets = bucketize([torch.ones(3) for _ in range(3)], segments=[0, 1, 0], n_segments=2)
    grads = buckets.buckets[0].grads
    for bad in (0, 1):  # uses the same buckets in each step
        before = [g._version for g in grads]
        grads[bad][2] = NAN
        measure(buckets)
        scale(buckets, factor(1.0), YES)
        touched = [g._version - v for g, v in zip(grads, before, strict=True)]
        assert touched == [2 if i == bad else 0 for i in range(3)]
        assert grads[bad].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.usefixtures("each_backend")
def test_multipliers_of_nan_and_zero_as_in_torch():
    grad = torch.tensor([1.0, INF])
    scale(bucketize([grad]), factor(0.0), NO)
    assert grad[0] == 0.0 and grad[1].isnan()
    scale(bucketize([grad]), factor(NAN), NO)
    assert grad.isnan().all()


@pytest.mark.usefixtures("each_backend")
def test_strides_and_complex_numbers():
    memory = torch.ones(4, 4)
    complex_grad = torch.tensor([3 + 4j])
    scale(bucketize([memory[:, ::2], complex_grad, torch.tensor(2.0)]), factor(0.5), NO)
    assert memory.tolist() == [[0.5, 1.0, 0.5, 1.0]] * 4
    assert complex_grad.tolist() == [1.5 + 2j]


def test_nothing_to_apply():
    scale(bucketize([]), factor(0.5), YES)
    scale(bucketize([None, torch.empty(0)]), factor(0.5), YES)


def runs_of_two() -> tuple[Tensor, GradBuckets]:
    """Two gradients with a gap of zeros between them, in one run."""
    flat = torch.tensor([1.0, 2.0, 0.0, 0.0, 4.0])
    grads = [flat[:2], flat[4:]]
    cpu = torch.device("cpu")
    bucket = GradBucket(cpu, flat.dtype, grads, range(2), [0, 0], (Run(flat, 0),))
    return flat, GradBuckets((bucket,), 2, 1, None, cpu)


def test_a_run_is_scaled_in_one_piece():
    flat, buckets = runs_of_two()
    scale(buckets, factor(0.5), NO)
    assert flat.tolist() == [0.5, 1.0, 0.0, 0.0, 2.0]
    assert flat._version == 1


@pytest.mark.parametrize("multiplier", [NAN, INF])
def test_the_gaps_of_a_run_stay_zero(multiplier):
    flat, buckets = runs_of_two()
    scale(buckets, factor(multiplier), NO)
    assert flat[2:4].tolist() == [0.0, 0.0]
    assert not flat[[0, 1, 4]].isfinite().any()


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
def test_the_stages_together(nonfinite):
    grads = [torch.tensor([3.0, NAN]), torch.tensor([4.0])]
    buckets = bucketize(grads)
    stats = measure(buckets)
    policy = Policy(factor(1.0), nonfinite)
    apply(buckets, decide(stats, Signals.none(buckets.device), None, policy))
    expected = {
        "skip": [3.0, NAN, 4.0],
        "zero": [0.6, 0.0, 0.8],
        "propagate": [NAN, NAN, NAN],
    }[nonfinite]
    assert torch.cat(grads).tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1 / 3, 0.999999, 1e-40, 1e-300, 65536.0, NAN, INF])
def test_a_single_gradient_is_rounded_like_a_list(dtype, multiplier):
    alone = torch.randn(4097).to(DTYPES[dtype])
    among = alone.clone()
    scale(bucketize([alone]), factor(multiplier), NO)
    scale(bucketize([among, torch.ones(1, dtype=among.dtype)]), factor(multiplier), NO)
    assert_bitwise_equal(alone, among)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_lists_are_bitwise_as_in_torch_and_get_new_versions(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (0,), (), (40_000,), (7,)]
    grads = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    grads += [
        torch.randn(6, 4, generator=g).to(dtype).t()[::2],
        torch.full((2,), torch.inf).to(dtype),
    ]
    expected = [t.clone() for t in grads]
    torch._foreach_mul_(expected, torch.tensor(0.3001))
    versions = [t._version for t in grads]
    scale(bucketize(grads), factor(0.3001), NO)
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)
    assert all(t._version > v for t, v in zip(grads, versions, strict=True))
