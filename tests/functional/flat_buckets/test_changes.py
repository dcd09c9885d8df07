"""Slots of parameters that lose their gradient, are frozen or unfrozen, or change dtype."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from fastguard import FlatGradBuckets, GuardedOptimizer
from fastguard.errors.versions import GRAD_DTYPE
from guardtest.flat import attached
from guardtest.interrupts import interrupted
from guardtest.training import new_parameters
from guardtest.versions import needs

NAN = float("nan")


@pytest.mark.parametrize("how", ["model", "optimizer", "by hand"])
def test_none_remains_none_so_that_weight_decay_changes_nothing(how):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList([a, b])
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    opt = GuardedOptimizer(inner, flat_buckets=True)
    before = b.weight.detach().clone()
    for step in range(3):
        if how == "model":
            model.zero_grad(set_to_none=True)
        elif how == "optimizer":
            inner.zero_grad(set_to_none=True)
        else:
            for p in model.parameters():
                p.grad = None
        a(torch.ones(1, 2) * step).sum().backward()
        opt.step()
        assert b.weight.grad is None
    assert torch.equal(b.weight, before)
    assert not torch.equal(a.weight, torch.zeros_like(a.weight))
    opt.zero_grad()  # attaches the gradient to its slot again
    assert attached(opt._gradients.flat)


def test_the_old_slot_of_a_gradient_that_is_none_does_not_count():
    p, q = new_parameters([(2,), (2,)])
    opt = GuardedOptimizer(torch.optim.SGD([p, q], lr=1.0), flat_buckets=True)
    p.grad.fill_(100.0)
    q.grad.fill_(1.0)
    opt.step()
    p.grad = None
    opt.step()
    assert [r.total_norm for r in opt.records()] == pytest.approx([20002**0.5, 2**0.5])


def test_a_parameter_unfrozen_later_is_guarded():
    """The parameter has no slot at first, but its gradients must be measured."""
    head, body = new_parameters([(2,), (3,)])
    body.requires_grad_(False)
    opt = GuardedOptimizer(
        torch.optim.SGD([head, body], lr=1.0),
        max_norm=1.0,
        flat_buckets=True,
        named_parameters=[("head", head), ("body", body)],
    )
    head.grad.fill_(1.0)
    opt.step()
    assert body.grad is None
    body.requires_grad_(True)
    opt.zero_grad()
    (head.sum() + body.sum()).backward()
    opt.step()
    assert attached(opt._gradients.flat)
    (body * NAN).sum().backward()
    opt.step()
    records = opt.records()
    assert records[1].total_norm == pytest.approx(5**0.5)
    assert records[2].culprits == (("body", 3, 0, 0),)


def test_a_parameter_frozen_later_is_not_changed():
    head, body = new_parameters([(2,), (3,)])
    opt = GuardedOptimizer(
        torch.optim.AdamW([head, body], lr=0.1, weight_decay=0.5), flat_buckets=True
    )
    (head.sum() + body.sum()).backward()
    opt.step()
    body.requires_grad_(False)
    before = body.clone()
    for _ in range(2):
        opt.zero_grad()
        head.sum().backward()
        opt.step()
    assert torch.equal(body, before)
    body.requires_grad_(True)
    opt.zero_grad()
    assert attached(opt._gradients.flat)


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_a_model_that_changes_its_dtype_gets_new_slots(detached):
    model = nn.Linear(3, 2)
    flat = FlatGradBuckets(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    if detached:
        model.zero_grad(set_to_none=True)
    model.to(torch.bfloat16)
    flat.zero_()
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert flat.measure().total_norm.item() == pytest.approx(8**0.5)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert attached(flat)


def test_a_parameter_whose_data_is_swapped_keeps_its_slot():
    (p,) = new_parameters([(3,)])
    flat = FlatGradBuckets([p])
    p.data = torch.ones(3)
    (p * 2).sum().backward()
    assert attached(flat)
    assert flat.measure().total_norm.item() == pytest.approx(12**0.5)


@needs(GRAD_DTYPE)
def test_gradients_of_another_dtype_than_the_parameter():
    (p,) = new_parameters([(3,)], torch.bfloat16)
    p.grad_dtype = torch.float32
    flat = FlatGradBuckets([p])
    assert p.grad.dtype == torch.float32
    p.grad = torch.tensor([3.0, 4.0, 1e-3])
    assert flat.measure().total_norm.item() == pytest.approx(5.0000001, rel=1e-7)
    assert attached(flat)


@pytest.mark.parametrize("how", ["added", "deleted", "exchanged"])
def test_a_gradient_that_is_none_while_groups_change_remains_none(how):
    def run(flat):
        a, b, c, d = new_parameters([(2,), (3,), (2,), (4,)])
        groups = [{"params": [a, b]}, {"params": [d]}]
        inner = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
        opt = GuardedOptimizer(inner, flat_buckets=flat)
        for step in range(4):
            opt.zero_grad()
            if step == 1:
                if how == "added":
                    opt.add_param_group({"params": [c]})
                elif how == "deleted":
                    del opt.param_groups[1]
                else:
                    opt.param_groups[1]["params"][0] = c
            for p in (a, b, c, d):
                p.grad = None
            a.grad = torch.ones(2)
            if step == 3:
                b.grad, c.grad = torch.ones(3), torch.ones(2)
            opt.step()
            if step < 3:
                assert b.grad is None
        return [p.detach().clone() for p in (a, b, c, d)]

    assert all(map(torch.equal, run(True), run(False)))


def test_a_step_with_only_frozen_parameters_does_nothing_and_the_next_is_guarded():
    a, c = new_parameters([(2,), (2,)])
    c.requires_grad_(False)
    opt = GuardedOptimizer(torch.optim.SGD([a], lr=0.1), max_norm=1.0, flat_buckets=True)
    opt.add_param_group({"params": [c]})
    del opt.param_groups[0]
    before = c.detach().clone()
    opt.step()
    opt.zero_grad()
    c.requires_grad_(True)
    c.grad = torch.full((2,), NAN)
    opt.step()
    assert torch.equal(c, before)
    opt.zero_grad()
    c.sum().backward()
    opt.step()
    assert not torch.equal(c, before)
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)
    assert attached(opt._gradients.flat)


@pytest.mark.parametrize("flat", ["flat_buckets", "flat_parameters"])
def test_a_guard_may_start_with_only_frozen_parameters(flat):
    (p,) = new_parameters([(2,)])
    p.requires_grad_(False)
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.1), **{flat: True})
    opt.step()
    before = p.detach().clone()
    p.requires_grad_(True)
    for factor in (NAN, 1.0):
        opt.zero_grad()
        (p.sum() * factor).backward()
        opt.step()
    assert torch.equal(p, before - 0.1)
    assert (opt.applied_steps, opt.skipped_steps) == (2, 1)


def test_a_copy_of_a_guard_keeps_a_gradient_that_is_none():
    a, b = new_parameters([(2,), (3,)])
    inner = torch.optim.SGD([a, b], lr=0.1, weight_decay=0.5)
    twin = copy.deepcopy(GuardedOptimizer(inner, flat_buckets=True))
    twin.step()  # a copied parameter has no gradient
    assert all(map(torch.equal, twin.param_groups[0]["params"], (a, b)))
    twin.zero_grad()
    assert attached(twin._gradients.flat)


def test_an_interrupted_layout_of_slots_is_repeated():
    parameters = new_parameters([(2,), (3,), (4,)])
    for at in range(0, 60, 2):
        flat = FlatGradBuckets(parameters)
        for p in parameters:
            p.grad.fill_(2.0)
        with suppress(KeyboardInterrupt), interrupted(at) as where:
            flat._attach()
        assert where
        assert flat.measure().total_norm.item() == 6.0, where
        flat.zero_()
        assert attached(flat) and not any(p.grad.any() for p in parameters), where
        for p in parameters:
            p.grad = None
