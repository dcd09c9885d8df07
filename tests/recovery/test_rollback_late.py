"""`Rollback` with late records: as on a GPU, each arrives just before the next step."""

from __future__ import annotations

import pytest
import torch

from fastguard import (
    GuardedLR,
    GuardedOptimizer,
    Rollback,
    Threshold,
)
from guardtest import longrun


def recorded_spikes(monkeypatch: pytest.MonkeyPatch, delayed: bool, losses: list[float]):
    if delayed:
        longrun.delay_records(monkeypatch)
    model = torch.nn.Linear(2, 1)
    rule = Threshold(max=10.0, action="record")
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), spike={"loss": rule})
    rollback = Rollback(opt, {"model": model}, every=2, after_skips=None, after_spikes=2)
    weights, rewinds = [model.weight.clone()], []
    for i, loss in enumerate(losses):
        opt.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        opt.step(loss=loss)
        weights.append(model.weight.clone())
        rewinds.append(rollback.step(i))
    return model, weights, rewinds


def test_a_step_that_may_have_spiked_is_in_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for delayed in (False, True):
        losses = [1.0, 1.0, 99.0, 99.0, *[1.0] * delayed]
        model, weights, rewinds = recorded_spikes(monkeypatch, delayed, losses)
        rewind = next(r for r in rewinds if r is not None)
        assert torch.equal(model.weight, weights[2])
        found.append((rewind.step, rewind.position, rewind.skip))
    assert found == [(2, 1, (2, 3))] * 2


@pytest.mark.parametrize("lr_first", [True, False])
def test_a_snapshot_does_not_disturb_a_schedule(
    monkeypatch: pytest.MonkeyPatch, lr_first: bool
) -> None:
    """`Rollback` fetches verdicts early; the schedule still gets them at the usual time."""
    longrun.delay_records(monkeypatch)

    def rates(every: int) -> list[float]:
        opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0))
        lr = GuardedLR(torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5))
        rollback = Rollback(opt, {}, lr=lr, every=every)
        seen = []
        for _ in range(6):
            opt.step()
            for call in (lr.step, rollback.step) if lr_first else (rollback.step, lr.step):
                call()
            seen.append(opt.param_groups[0]["lr"])
        return seen

    assert rates(2) == rates(99) == [0.5**i for i in range(6)]


@pytest.mark.parametrize("delayed", [False, True])
def test_a_rollback_restores_the_schedule(monkeypatch: pytest.MonkeyPatch, delayed: bool) -> None:
    if delayed:
        longrun.delay_records(monkeypatch)
    opt = GuardedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0))
    lr = GuardedLR(torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5))
    rollback = Rollback(opt, {}, lr=lr, lr_factor=1.0, every=3)

    def steps(n: int) -> list[float]:
        seen = []
        for _ in range(n):
            opt.step()
            lr.step()
            rollback.step()
            seen.append(opt.param_groups[0]["lr"])
        return seen

    steps(3)
    expected = steps(2)
    assert rollback.trigger().step == 3
    assert steps(2) == expected
