"""`fastguard.optim` in a guard: the update applies the verdict, and no gradient is written."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard
import fastguard.optim as fused
import fastguard.optim.bits
from fastguard import CheckpointStore, GuardedOptimizer, NonFiniteGradError, Rollback, SpikeRule
from fastguard.guard.in_update import InUpdate
from guardtest.updates import same_bits

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (fused.AdamW, {}),
    (fused.Adam, dict(weight_decay=0.1)),
    (fused.SGD, dict(momentum=0.9)),
    (fused.Lion, {}),
]
SHAPES = [(3, 4), (5,), (40_000,)]


def parameters_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]


def give(seed: int, *lists: list[Tensor], scale: float = 1.0) -> None:
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape, generator=torch.Generator().manual_seed(seed * 100 + i))
        for p in same:
            p.grad = (grad * scale).to(p.dtype)


def grads_of(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_fused_optimizers_use_their_own_stepper(kind, settings):
    stepper = GuardedOptimizer(kind(parameters_of(), **settings))._stepper
    assert type(stepper) is InUpdate
    assert stepper.reads_first  # reading the verdict first costs nothing on a CPU
    assert stepper.skips == "in the update"  # shown by `describe` on a GPU


@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_flat_buckets_change_no_limit_if_a_parameter_is_frozen(kind, settings, scope):
    results = []
    for flat in (False, True):
        frozen, *parameters = ours = parameters_of()
        frozen.requires_grad_(False)
        frozen.grad = None
        own = {"max_norm": 1e-3} if scope == "group" else {}
        groups = [{"params": ours[:2], **own}, {"params": ours[2:]}]
        inner = kind(groups, **settings)
        opt = GuardedOptimizer(inner, max_norm=0.5, clip_scope=scope, flat_buckets=flat)
        for _ in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.full_like(p, 10.0**i)
            opt.step()
        parameters[0].requires_grad_(False)  # a parameter may also be frozen later
        parameters[0].grad = None
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        opt.step()
        results.append([p.detach().clone() for p in ours])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_clipping_is_folded_into_the_update(kind, settings, scope):
    ours, theirs = parameters_of(), parameters_of()
    groups = [{"params": ours[:1], "max_norm": 0.5}, {"params": ours[1:]}]
    guard = (
        GuardedOptimizer(kind(groups, **settings), max_norm=1.0, clip_scope=scope)
        if (scope == "group")
        else GuardedOptimizer(kind(ours, **settings), max_norm=1.0, clip_scope=scope)
    )
    plain = kind(theirs, **settings)
    for step in range(4):
        give(step, ours, theirs)
        before = grads_of(ours)
        guard.step()
        assert all(map(same_bits, grads_of(ours), before))
        if scope == "global":
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        elif scope == "group":
            torch.nn.utils.clip_grad_norm_(theirs[:1], 0.5)
            torch.nn.utils.clip_grad_norm_(theirs[1:], 1.0)
        else:
            for p in theirs:
                torch.nn.utils.clip_grad_norm_(p, 1.0)
        plain.step()
    assert [r.action for r in guard.records()] == ["clipped"] * 4
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_nonfinite_gradient_skips_weights_and_state(kind, settings, first):
    ours = parameters_of()
    guard = GuardedOptimizer(kind(ours, **settings), max_norm=1.0)
    if not first:
        give(0, ours)
        guard.step()
    before = copy.deepcopy(guard.optimizer.state_dict()), [p.detach().clone() for p in ours]
    give(1, ours)
    ours[1].grad[2] = math.nan
    guard.step()
    assert guard.skipped_steps == 1
    assert all(map(torch.equal, before[1], ours))
    after = guard.optimizer.state_dict()
    for i, entries in before[0]["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, after["state"][i][key])
    give(2, ours)
    guard.step()
    assert not torch.equal(before[1][0], ours[0])
    assert guard.applied_steps == (1 if first else 2)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_zero_mode_cleans_gradients_in_the_update(kind, settings):
    ours, theirs = parameters_of(), parameters_of()
    guard = GuardedOptimizer(kind(ours, **settings), max_norm=1.0, nonfinite="zero")
    plain = kind(theirs, **settings)
    give(0, ours, theirs)
    ours[1].grad[2], theirs[1].grad[2] = math.inf, 0.0
    guard.step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    plain.step()
    assert ours[1].grad[2] == math.inf
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_raise_mode_changes_nothing():
    ours = parameters_of()
    guard = GuardedOptimizer(fused.AdamW(ours), nonfinite="raise")
    give(0, ours)
    ours[1].grad[2] = math.nan
    before = [p.detach().clone() for p in ours]
    with pytest.raises(NonFiniteGradError):
        guard.step()
    assert all(map(torch.equal, before, ours))
    assert not guard.optimizer.state


def test_propagate_mode_behaves_as_torch():
    ours = parameters_of()
    guard = GuardedOptimizer(fused.SGD(ours), nonfinite="propagate", max_norm=1.0)
    give(0, ours)
    ours[1].grad[2] = math.nan
    guard.step()
    assert all(p.isnan().all() for p in ours)


def test_a_spike_is_skipped_or_scaled():
    ours = parameters_of()
    rule = SpikeRule(window=8, warmup=4, sigma=3.0, action="clip")
    guard = GuardedOptimizer(fused.SGD(ours, lr=1.0), spike=rule)
    for step in range(6):
        give(0, ours, scale=1.0 + 0.01 * step)
        guard.step()
    before = ours[2].detach().clone()
    give(0, ours, scale=1000.0)
    guard.step()
    moved = (ours[2].detach() - before).norm()
    assert 100 < moved < 400  # the norm of ordinary gradients is about 200
    assert guard.records()[-1].action == "clipped"


@pytest.mark.parametrize("master", [None, "float32", "remainder"])
def test_unscaling_does_not_write_gradients(master):
    dtype = torch.float32 if master is None else torch.bfloat16
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    guard = GuardedOptimizer(fused.AdamW(ours, master=master), max_norm=1.0)
    plain = GuardedOptimizer(fused.AdamW(theirs, master=master), max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # creates its scale
    for step in range(4):
        give(step, theirs)
        give(step, ours, scale=2.0**10 if step != 2 else math.inf)
        if step != 2:
            plain.step()
        before = grads_of(ours)
        scaler.step(guard)
        scaler.update(2.0**10)
        assert all(map(same_bits, grads_of(ours), before))
    assert guard.skipped_steps == 1
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(p.detach(), q.detach())


def test_a_post_hook_of_the_optimizer_runs_only_when_it_steps():
    ours = parameters_of()
    inner = fused.AdamW(ours)
    seen: list[int] = []
    inner.register_step_post_hook(lambda *_: seen.append(1))
    guard = GuardedOptimizer(inner)
    for scale in (1.0, math.nan, 1.0):
        give(0, ours, scale=scale)
        guard.step()
    assert len(seen) == 2


def test_flat_buckets_work_and_other_updates_are_refused():
    ours, theirs = parameters_of(), parameters_of()
    flat = GuardedOptimizer(fused.AdamW(ours), max_norm=1.0, flat_buckets=True)
    plain = GuardedOptimizer(fused.AdamW(theirs), max_norm=1.0)
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 10 + i))
            p.grad.copy_(grad)
            q.grad = grad.clone()
        flat.step()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"does not support fastguard\.optim\.adamw\.AdamW, only"):
        GuardedOptimizer(fused.AdamW(parameters_of()), flat_parameters=True)
    with pytest.raises(TypeError, match=r"whose own update can skip a step; remove compile_step"):
        GuardedOptimizer(fused.AdamW(parameters_of()), compile_step=True)


@pytest.mark.parametrize("master", [None, "remainder"])
def test_a_guard_resumes_bitwise(master):
    dtype = torch.float32 if master is None else torch.bfloat16
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    first = GuardedOptimizer(fused.AdamW(ours, master=master), max_norm=1.0)
    for step in range(3):
        give(step, ours)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    second = GuardedOptimizer(fused.AdamW(theirs, master=master), max_norm=1.0)
    second.load_state_dict(saved)
    assert second.applied_steps == 3
    for step in range(3, 6):
        give(step, ours, theirs)
        first.step()
        second.step()
    assert all(map(torch.equal, ours, theirs))


def test_a_state_dtype_survives_a_torch_checkpoint_in_a_guard():
    theirs = parameters_of()
    before = GuardedOptimizer(torch.optim.AdamW(theirs, fused=True))
    give(0, theirs)
    before.step()
    after = GuardedOptimizer(fused.AdamW(theirs, state_dtype=torch.bfloat16))
    after.load_state_dict(before.state_dict())
    assert after.optimizer.state[theirs[0]]["exp_avg"].dtype is torch.bfloat16
    give(1, theirs)
    after.step()


def test_a_rollback_restores_weights_and_remainders():
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    inner = fused.AdamW(model.parameters(), lr=1e-3, master="remainder")
    guard = GuardedOptimizer(inner, max_norm=1.0)
    rollback = Rollback(guard, {"model": model}, every=1, after_skips=2, lr_factor=1.0)
    for step in range(3):
        give_model(model, step)
        guard.step()
        assert rollback.step() is None
    good = exact(model, inner)
    rewind = None
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        guard.step()
        rewind = rewind or rollback.step()
    assert rewind is not None
    states = [exact(model, inner), good]
    assert inner.state[model.weight]["remainder"].dtype is torch.int16
    assert rewind.step == 3
    assert all(map(torch.equal, *states))


def give_model(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def exact(model: torch.nn.Module, inner: Any) -> list[Tensor]:
    return [
        fused.bits.from_remainder(p.detach(), inner.state[p]["remainder"])
        for p in model.parameters()
    ]


def test_a_checkpoint_store_keeps_the_remainder(tmp_path):
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    inner = fused.AdamW(model.parameters(), master="remainder", rounding="nearest")
    guard = GuardedOptimizer(inner)
    give_model(model, 0)
    guard.step()
    store = CheckpointStore(tmp_path)
    store.save(step=1, model=model, optimizer=guard)
    before = exact(model, inner)
    give_model(model, 1)
    guard.step()
    assert not all(map(torch.equal, exact(model, inner), before))
    store.load(model=model, optimizer=guard)
    assert all(map(torch.equal, exact(model, inner), before))
    assert inner.state[model.weight]["remainder"].dtype is torch.int16


@pytest.mark.parametrize("kind", [fused.AdamW, fused.SGD, fused.Lion])
def test_diagnose_works_and_does_not_change_it(kind):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    guard = GuardedOptimizer(kind(model.parameters()), max_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    batch = torch.randn(16, 4), torch.randn(16, 1)
    found = fastguard.diagnose(model, batch, torch.nn.functional.mse_loss, optimizer=guard)
    assert not found.errors
    assert not [f for f in found.findings if f.kind == "not-checked"]
    assert all(map(torch.equal, before, model.parameters()))
    assert not guard.optimizer.state
