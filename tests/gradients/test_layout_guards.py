"""Only lists with a known layout are recognized."""

import random

import pytest
import torch

from fastguard.gradients import layout_guards
from fastguard.gradients.buckets import bucketize
from fastguard.stages.measure import measure

N = 40


@pytest.fixture(autouse=True)
def none_is_known(monkeypatch):
    monkeypatch.setattr(layout_guards, "_forms", ())


def grads_of(n=N):
    return [torch.randn(2 + i % 3, 4) for i in range(n)]


def test_new_tensors_with_the_same_layout_are_recognized():
    first = bucketize(grads_of()).buckets[0]
    again = bucketize(grads_of()).buckets[0]
    assert again.form is first.form is layout_guards.known_form(grads_of()) is not None
    assert (again.device, again.dtype, len(again.grads)) == (first.device, first.dtype, N)


OTHERS = {
    "dtype": lambda g: g.double(),
    "shape": lambda g: g.view(-1),
    "size": lambda g: torch.randn(9, 4),
    "strides": lambda g: g.t().contiguous().t(),
    "expanded": lambda g: torch.zeros(()).expand_as(g),
    "holes": lambda g: torch.randn(len(g), 8)[:, ::2],
    "device": lambda g: g.to("meta"),
    "layout": lambda g: g.to_sparse(),
    "parameter": torch.nn.Parameter,
    "negative bit": lambda g: torch._neg_view(g),
    "none": lambda g: None,
    "no tensor": lambda g: 1.0,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("at", [0, N // 2, N - 1])
def test_a_list_that_differs_anywhere_is_not_recognized(other, at):
    form = bucketize(grads_of()).buckets[0].form
    different = grads_of()
    different[at] = other(different[at])
    assert form is not None and not form.fits(different)
    assert not form.fits(grads_of(N - 1)) and not form.fits(grads_of(N + 1))
    assert form.fits(grads_of())


def test_short_lists_subclasses_and_complex_gradients_are_not_recognized():
    assert bucketize(grads_of(layout_guards.MIN_TENSORS - 1)).buckets[0].form is None
    assert bucketize(list(map(torch.nn.Parameter, grads_of()))).buckets[0].form is None
    mixed = [*grads_of(), torch.randn(3, dtype=torch.complex64)]
    for _ in range(2):
        kinds = [(b.dtype, b.form is None) for b in bucketize(mixed).buckets]
        assert kinds == [(torch.float32, False), (torch.float32, True)]


def test_alternating_sets_of_none_gradients_are_all_recognized():
    for i in [*range(6), *range(6)]:
        grads = grads_of()
        grads[i] = None
        bucketize(grads)
    assert len(layout_guards._forms) == 6
    for i in range(2 * layout_guards.FORMS):
        bucketize(grads_of(N + i))
    assert len(layout_guards._forms) == layout_guards.FORMS


@pytest.mark.parametrize("how", ["absent", "refuses", "says no"])
def test_without_torchs_check_every_list_is_inspected(how, monkeypatch):
    class Guards:
        def __init__(self, *grads, **options):
            if how == "refuses":
                raise TypeError("other arguments")

        def check(self, *grads):
            return False

    if how == "absent":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Guards)
    for _ in range(2):
        bucket = bucketize(grads_of()).buckets[0]
        assert bucket.form is None and len(bucket.grads) == N
    assert not layout_guards._forms


def test_buckets_of_recognized_lists_equal_those_of_inspected_lists(monkeypatch):
    """Recognized or not, lists of two dtypes with None in any order give the same buckets."""
    kinds = [torch.float32, torch.bfloat16]
    lists = []
    for _ in range(4):
        picked = [random.choice([*kinds, None]) for _ in range(N + 20)]
        lists.append(lambda picked=picked: [d and torch.full((3,), 2.0, dtype=d) for d in picked])
    for _ in range(20):
        grads = random.choice(lists)()
        known = bucketize(grads)
        with monkeypatch.context() as patch:
            patch.setattr("fastguard.gradients.buckets.known_form", lambda grads: None)
            looked_at = bucketize(grads)
        for a, b in zip(known.buckets, looked_at.buckets, strict=True):
            assert (a.device, a.dtype, list(a.tensor_ids)) == (
                b.device,
                b.dtype,
                list(b.tensor_ids),
            )
            assert all(x is y for x, y in zip(a.grads, b.grads, strict=True))
        n = sum(g is not None for g in grads)
        assert measure(known).total_norm.item() == pytest.approx((12 * n) ** 0.5)
