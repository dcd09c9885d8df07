"""The fused optimizers without a guard agree with torch's, also with scalers and masters."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard.optim as guarded
from guardtest.updates import same_bits

SHAPES = [(7,), (300, 200), (5, 6, 3, 3), ()]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "AdamW amsgrad": ("AdamW", dict(amsgrad=True)),
    "Adam": ("Adam", dict(weight_decay=0.1)),
    "SGD": ("SGD", dict(weight_decay=0.1)),
    "SGD momentum": ("SGD", dict(momentum=0.9)),
    "SGD dampening": ("SGD", dict(momentum=0.9, dampening=0.3)),
    "SGD nesterov": ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
}
EVERY = [(guarded.AdamW, {}), (guarded.Adam, {}), (guarded.Lion, {})]
EVERY += [(guarded.SGD, dict(momentum=m, dampening=d)) for m, d in ((0.0, 0.0), (0.9, 0.3))]


def parameters_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]


def give(seed: int, *lists: list[Tensor], scale: float = 1.0) -> None:
    """Sets the same new gradients in each list."""
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape, generator=torch.Generator().manual_seed(seed * 100 + i))
        for p in same:
            p.grad = (grad * scale).to(p.dtype)


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any):
    """Returns our optimizer and torch's, and the parameters of each."""
    name, settings = KINDS[kind]
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    return (
        getattr(guarded, name)(ours, lr=1e-2, **settings, **options),
        getattr(torch.optim, name)(theirs, lr=1e-2, foreach=True, **settings),
        ours,
        theirs,
    )


def assert_trains_alike(a, b, ours, theirs, steps):
    """Takes steps with both optimizers and compares the parameters."""
    for step in range(steps):
        give(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_trains_like_torch(kind, reproducible):
    a, b, ours, theirs = pair(kind, reproducible=reproducible)
    assert_trains_alike(a, b, ours, theirs, steps=10)
    for p, q in zip(ours, theirs, strict=True):
        assert set(b.state[q]) <= set(a.state[p])


@pytest.mark.parametrize("reproducible", [False, True])
def test_after_100_steps_the_error_is_that_of_torchs_fused_optimizer(reproducible):
    def error(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> float:
        exact = [p.detach().double().requires_grad_() for p in parameters]
        truth = torch.optim.AdamW(exact, lr=1e-2)
        for step in range(100):
            give(step, parameters)
            for p, q in zip(parameters, exact, strict=True):
                q.grad = p.grad.double()
            optimizer.step()
            truth.step()
        pairs = zip(parameters, exact, strict=True)
        return math.sqrt(sum(float((p.double() - q).square().sum()) for p, q in pairs))

    ours, theirs = parameters_of(), parameters_of()
    mine = error(guarded.AdamW(ours, lr=1e-2, reproducible=reproducible), ours)
    torchs = error(torch.optim.AdamW(theirs, lr=1e-2, fused=True), theirs)
    # The kernel is the same, or has one more or two fewer roundings, so errors are about equal.
    assert mine <= 1.2 * torchs


@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum", "SGD nesterov"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_updated_from_float32(kind, dtype):
    a, _, ours, _ = pair(kind, dtype)
    exact = [p.detach().float().requires_grad_() for p in ours]
    name, settings = KINDS[kind]
    b = getattr(torch.optim, name)(exact, lr=1e-2, foreach=True, **settings)
    give(0, ours)
    for p, q in zip(ours, exact, strict=True):
        q.grad = p.grad.float()
    a.step()
    b.step()
    for p, q in zip(ours, exact, strict=True):
        assert same_bits(p.detach(), q.detach().to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_with_other_strides_reaches_the_right_elements(layout):
    p = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    grad = torch.randn(2, 3, 4, 5)
    p.grad = grad.contiguous(memory_format=layout)
    guarded.SGD([p], lr=1.0).step()
    assert torch.equal(p.detach(), -grad)


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_the_first_step_can_be_skipped(kind, settings):
    ours, fresh = parameters_of(), parameters_of()
    before = [p.detach().clone() for p in ours]
    skipping, plain = kind(ours, **settings), kind(fresh, **settings)
    give(0, ours, scale=math.nan)
    skipping.found_inf = torch.ones(())
    skipping.step()
    del skipping.found_inf
    assert all(map(torch.equal, before, ours))
    give(1, ours, fresh)
    skipping.step()
    plain.step()
    assert all(map(torch.equal, ours, fresh))


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_a_skip_does_not_change_weights_and_state(kind, settings):
    ours = parameters_of()
    optimizer = kind(ours, **settings)
    give(0, ours)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in ours]
    give(1, ours, scale=math.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = optimizer.state_dict()
    assert all(map(torch.equal, weights, ours))
    for i, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, after["state"][i][key])


def test_a_grad_scaler_unscales_and_skips_as_with_torch():
    a, _, ours, _ = pair("AdamW")
    theirs = parameters_of()
    b = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(5):
        for optimizer, parameters, scaler in zip((a, b), (ours, theirs), scalers, strict=True):
            optimizer.zero_grad()
            loss = sum((p * (p.detach() + step)).sum() for p in parameters)
            scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
            before = [p.grad.clone() for p in ours]
            scaler.step(optimizer)
            scaler.update()
            if optimizer is a:
                assert all(same_bits(p.grad, g) for p, g in zip(ours, before, strict=True))
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert a.state[ours[0]]["step"] == b.state[theirs[0]]["step"] == 4


@pytest.mark.parametrize("master", ["float32", "remainder"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum"])
def test_a_master_trains_like_float32_to_the_last_bit(kind, master):
    a, _, ours, _ = pair(kind, torch.bfloat16, master=master, reproducible=True)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    name, settings = KINDS[kind]
    b = getattr(guarded, name)(exact, lr=1e-2, reproducible=True, **settings)
    for step in range(10):
        give(step, ours)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(ours, exact, strict=True):
        state = a.state[p]
        if master == "float32":
            assert same_bits(state["master"], q.detach())
        else:
            whole = guarded.bits.from_remainder(p.detach(), state["remainder"])
            assert same_bits(whole, q.detach())
        assert p.dtype is torch.bfloat16
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2.0**-8, atol=0.0)


def test_stochastic_rounding_applies_steps_that_nearest_rounds_away():
    def trained(rounding: Any, seed: int = 0) -> Tensor:
        p = torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
        optimizer = guarded.SGD([p], lr=1e-4, rounding=rounding, seed=seed)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    assert (trained("nearest") == 1.0).all()  # half the distance to the next number is 2**-9
    moved = trained("stochastic")
    # Steps of 2**-8 with probability 1e-4 * 2**8 each, ten of them.
    sigma = math.sqrt(10 * 1e-4 * 2.0**-8 / 100_000)
    assert abs(float(moved.double().mean()) - (1.0 - 1e-3)) <= 4 * sigma
    assert torch.equal(moved, trained("stochastic"))
    assert not torch.equal(moved, trained("stochastic", seed=1))


def test_a_bfloat16_state_decays_only_with_stochastic_rounding():
    def second_moment(rounding: Any) -> float:
        p = torch.nn.Parameter(torch.ones(10_000))
        optimizer = guarded.AdamW([p], rounding=rounding, state_dtype=torch.bfloat16)
        p.grad = torch.ones_like(p)
        optimizer.step()
        for _ in range(200):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        return float(optimizer.state[p]["exp_avg_sq"].double().mean())

    start = float(torch.tensor(1e-3).bfloat16())
    assert second_moment("nearest") == start
    assert second_moment("stochastic") == pytest.approx(start * 0.999**200, rel=0.01)


def test_settings_may_change_between_steps():
    ours, theirs = parameters_of(), parameters_of()
    a = guarded.AdamW(ours, lr=torch.tensor(1e-2))
    b = torch.optim.AdamW(theirs, lr=1e-2)
    for step, lr in enumerate((1e-2, 3e-2, 0.0)):
        a.param_groups[0]["lr"].fill_(lr)
        b.param_groups[0]["lr"] = lr
        give(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_param_groups_have_their_own_settings(kind):
    name, settings = KINDS[kind]
    ours, theirs = parameters_of(), parameters_of()

    def groups(parameters):
        return [{"params": parameters[:1], "lr": 0.3}, {"params": parameters[1:]}]

    a = getattr(guarded, name)(groups(ours), lr=1e-2, **settings)
    b = getattr(torch.optim, name)(groups(theirs), lr=1e-2, **settings)
    assert_trains_alike(a, b, ours, theirs, steps=3)


def test_parameters_without_a_gradient_are_updated_once_they_have_one():
    a, b, ours, theirs = pair("AdamW")
    for step in range(4):
        give(step, ours, theirs)
        if step < 2:
            ours[1].grad = theirs[1].grad = None
        a.step()
        b.step()
    assert a.state[ours[1]]["step"] == 2
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_closure_is_evaluated_once_with_gradients():
    (p,) = ours = [torch.nn.Parameter(torch.ones(3))]
    optimizer = guarded.SGD(ours, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_a_schedule_and_a_compiled_model_work():
    model = torch.nn.Linear(4, 2)
    compiled = torch.compile(model, backend="eager")
    optimizer = guarded.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = compiled(torch.ones(3, 4)).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert all(b < a for a, b in pairwise(losses))
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**4
