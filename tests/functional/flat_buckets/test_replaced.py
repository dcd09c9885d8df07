"""A gradient that replaces the view of a buffer is used instead of the view."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import FlatGradBuckets, GuardedOptimizer
from guardtest.flat import attached
from guardtest.training import assert_same_bits, new_parameters, snapshot

NAN = float("nan")


def set_to_none(p, value):
    p.grad = None
    p.grad = value


def view_of_a_buffer(p, value):
    big = torch.zeros(3 * value.numel() + 8, dtype=value.dtype)
    view = big[4 : 4 + value.numel()].view(value.shape)
    view.copy_(value)
    p.grad = view


def alone_in_its_storage(p, value):
    p.grad = value.clone().view(-1).view(value.shape)


def swapped_data(p, value):
    p.grad.data = value.clone()


def written_in_place(p, value):
    p.grad.copy_(value)


def other_strides(p, value):
    p.grad = value.t().contiguous().t() if value.dim() == 2 else value.clone()


def accumulated_after_none(p, value):
    p.grad = None
    (p * value).sum().backward()


def assigned_inside_hook(p, value):
    handle = p.register_hook(lambda g: value)
    p.grad = None
    p.sum().backward()
    handle.remove()


REPLACEMENTS = [
    set_to_none,
    view_of_a_buffer,
    alone_in_its_storage,
    swapped_data,
    written_in_place,
    other_strides,
    accumulated_after_none,
    assigned_inside_hook,
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_the_new_gradient_is_used_after_a_replacement(replace, max_norm):
    shapes = [(2, 3), (5,), (4,)]
    ours, theirs = new_parameters(shapes), new_parameters(shapes)
    opt = GuardedOptimizer(
        torch.optim.AdamW(ours, lr=0.1, fused=True), max_norm=max_norm, flat_buckets=True
    )
    plain = GuardedOptimizer(torch.optim.AdamW(theirs, lr=0.1, fused=True), max_norm=max_norm)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        opt.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            value = torch.randn(p.shape, generator=generator)
            q.grad = value.clone()
            if (step + i) % 2:
                replace(p, value)
            else:
                written_in_place(p, value)
        opt.step()
        plain.step()
        if replace is not view_of_a_buffer:
            assert attached(opt._gradients.flat)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        if max_norm is None:
            assert torch.equal(p, q)
    mine, reference = opt.records(), plain.records()
    for a, b in zip(mine, reference, strict=True):
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_nan_in_a_replaced_gradient_is_found(replace):
    p, q = new_parameters([(2, 3), (2,)])
    opt = GuardedOptimizer(torch.optim.SGD([p, q], lr=1.0), flat_buckets=True)
    before = snapshot(opt)
    replace(p, torch.full((2, 3), NAN))
    opt.step()
    assert_same_bits(snapshot(opt), before)
    assert opt.records()[0].culprits == (("parameter 0", 6, 0, 0),)
    opt.zero_grad()
    assert not p.grad.any()
    opt.step()
    assert opt.applied_steps == 1


def test_trusted_skips_the_check_for_replaced_gradients():
    (p,) = new_parameters([(2,)])
    flat = FlatGradBuckets([p], trusted=True)
    slot = p.grad
    p.grad = torch.ones(2)
    assert flat.measure().total_norm == 0.0
    flat.zero_()
    assert p.grad is not slot


@settings(max_examples=40)
@given(data=st.data())
def test_any_sequence_of_replacements_equals_no_flat_buckets(data):
    shapes = [(2, 3), (5,), (), (3, 2)]
    ours, theirs = new_parameters(shapes), new_parameters(shapes)
    make = torch.optim.SGD
    opt = GuardedOptimizer(make(ours, lr=0.1, weight_decay=0.1), flat_buckets=True)
    plain = GuardedOptimizer(make(theirs, lr=0.1, weight_decay=0.1))
    for step in range(4):
        if data.draw(st.booleans()):
            opt.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            choice = data.draw(st.sampled_from([*range(len(REPLACEMENTS)), "none", "keep"]))
            value = torch.full(p.shape, float(step + 1 + i))
            if choice == "none":
                p.grad = q.grad = None
            elif choice == "keep" or p.grad is None:
                q.grad = None if p.grad is None else p.grad.clone()
            else:
                REPLACEMENTS[choice](p, value)
                q.grad = p.grad.clone()
        opt.step()
        plain.step()
    assert all(map(torch.equal, ours, theirs))
    for a, b in zip(opt.records(), plain.records(), strict=True):
        assert a.total_norm == pytest.approx(b.total_norm, rel=1e-7)


TAKES_IN = {
    "measure": lambda flat: flat.measure().total_norm,
    "buckets": lambda flat: flat.buckets().buckets[0].grads[0].norm(),
}


@pytest.mark.parametrize("take_in", TAKES_IN.values(), ids=TAKES_IN)
def test_a_gradient_with_a_graph_is_measured_in_place(take_in):
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    flat = FlatGradBuckets([p])
    for _ in range(2):
        (p.grad,) = torch.autograd.grad(p.square().sum() / 2, [p], create_graph=True)
        assert take_in(flat) == 5.0
        assert p.grad.requires_grad
    flat.zero_()
    assert attached(flat) and not p.grad.requires_grad


@pytest.mark.filterwarnings("ignore:Using backward")  # about cycles, which zero_grad breaks
def test_an_optimizer_may_differentiate_gradients():
    """AdaHessian and SophiaH do so in their step."""
    parameters = new_parameters()
    products = []

    class Curvature(torch.optim.SGD):
        def step(self, closure=None):
            products[:] = torch.autograd.grad([p.grad.sum() for p in parameters], parameters)
            super().step()

    for flat in (False, True):
        opt = GuardedOptimizer(Curvature(parameters, lr=0.1), max_norm=0.1, flat_buckets=flat)
        for _ in range(2):
            opt.zero_grad()
            sum((p**3).sum() for p in parameters).backward(create_graph=True)
            expected = [6 * p.detach() for p in parameters]
            opt.step()
            assert opt.records()[0].action == "clipped"
            torch.testing.assert_close(products, expected)
