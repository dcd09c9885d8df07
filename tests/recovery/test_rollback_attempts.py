"""Repeated rollbacks: attempts, their learning rates, the end of a problem, and giving up."""

from __future__ import annotations

import math

import pytest
import torch

from fastguard import (
    GuardedLR,
    GuardedOptimizer,
    Rollback,
    TrainingDivergedError,
)
from guardtest.rollback_run import Run


def test_the_error_after_the_last_attempt_has_the_history() -> None:
    run = Run(every=2, after_skips=1, max_attempts=2)
    for i in range(4):
        run.batch(i)
    assert run.batch(4, math.nan).attempt == 1
    assert run.batch(5, math.nan).attempt == 2
    with pytest.raises(
        TrainingDivergedError, match=r"2 rollbacks did not solve the problem.*nonfinite"
    ):
        run.batch(6, math.nan)


def test_the_history_ends_with_the_last_bad_steps_and_their_culprits() -> None:
    run = Run(every=2, keep=1, after_skips=11, max_attempts=1)
    for i in range(11):
        run.opt.zero_grad()
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)
        named = run.model[0].weight if i == 10 else run.model[3].bias
        named.grad.view(-1)[0] = math.nan
        run.opt.step(tag=f"batch {i}")
        if i < 10:
            assert run.rollback.step(i) is None
    run.rollback.attempts = 1
    with pytest.raises(TrainingDivergedError, match=r"11 steps in a row") as error:
        run.rollback.step(10)
    assert [i for i in range(11) if f"step {i + 1} " in str(error.value)] == list(range(3, 11))
    assert list(error.value.culprits) == [("parameter 0", 1, 0, 0)]


def test_without_a_finite_snapshot_the_error_has_the_culprits_of_the_last_bad_step() -> None:
    run = Run(keep=1, after_skips=1)
    with torch.no_grad():
        run.model[0].weight.fill_(math.nan)
    run.rollback.snapshot()
    run.model[3].bias.grad = torch.full((1,), math.inf)
    run.opt.step()
    with pytest.raises(TrainingDivergedError, match="no snapshot is finite") as error:
        run.rollback.step()
    assert list(error.value.culprits) == [("parameter 5", 0, 1, 0)]


def test_attempts_restart_after_the_problem() -> None:
    run = Run(every=2, after_skips=1, max_attempts=1)
    for i in range(4):
        run.batch(i)
    run.batch(4, math.nan)
    for i in range(5, 12):
        run.batch(i)
    assert run.batch(12, math.nan).attempt == 1


def test_each_attempt_lowers_the_lr_further_and_restarts_the_count_of_skips() -> None:
    run = Run(every=2, after_skips=2, lr_factor=0.5)
    for i in range(4):
        run.batch(i)
    seen = []
    for i in (4, 6):
        assert run.batch(i, math.nan) is None  # skips are counted from the rollback on
        run.opt.zero_grad()
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)
        assert run.batch(i + 1, math.nan) is not None
        seen.append(run.opt.param_groups[0]["lr"])
        assert all(p.grad is None for p in run.model.parameters())
    assert seen == pytest.approx([0.005, 0.0025])


def test_the_log_of_a_rollback_shows_the_lr(caplog: pytest.LogCaptureFixture) -> None:
    """The restored schedule lacks the back-offs that led to the rollback."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0))
    lr = GuardedLR(opt, backoff=0.1)
    rollback = Rollback(opt, {}, every=2, after_skips=2, lr=lr, lr_factor=0.5)
    for loss in (1.0, 1.0, math.nan, math.nan):
        p.grad = torch.ones(2)
        opt.step(loss=loss)
        lr.step()
        rollback.step()
    assert lr.get_last_lr() == [0.5]
    said = [m for m in caplog.messages if "rolled back" in m or "backed off" in m]
    assert said[-1].endswith("; the schedule is now multiplied by 0.5")
    assert "backed off to 0.01 of the schedule" in said[-2]


def test_without_a_schedule_the_log_does_not_mention_the_lr(caplog) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0))
    Rollback(opt, {}).trigger()
    assert caplog.messages[-1].endswith(": at step 0, the caller asked for it")


def test_a_snapshot_before_the_problem_ended_does_not_reset_the_attempts() -> None:
    run = Run(every=1, after_skips=2, lr_factor=0.5)
    for i in range(4):
        run.batch(i)
    run.batch(4, math.nan)
    assert run.batch(5, math.nan).attempt == 1  # the problem lasted until step 6
    assert run.opt.param_groups[0]["lr"] == pytest.approx(0.005)
    run.batch(6)
    assert run.rollback.snapshots[-1] == 5  # it contains the lowered learning rate
    run.batch(7, math.nan)
    assert run.batch(8, math.nan).attempt == 2
    assert run.opt.param_groups[0]["lr"] == pytest.approx(0.0025)
    run.batch(9)
    run.batch(10, math.nan)
    assert run.batch(11, math.nan).attempt == 3
    assert run.opt.param_groups[0]["lr"] == pytest.approx(0.00125)
    for i in range(12, 20):
        run.batch(i)
    run.batch(20, math.nan)
    assert run.batch(21, math.nan).attempt == 1
    assert run.opt.param_groups[0]["lr"] == pytest.approx(0.000625)


def test_a_problem_ends_at_its_latest_step_of_all_attempts() -> None:
    run = Run(every=100, after_skips=2, max_attempts=9)
    run.rollback.snapshot()
    run.batch(0, math.nan)
    assert run.batch(1, math.nan).attempt == 1  # the problem lasted until step 2
    run.batch(2)
    assert run.rollback.trigger().attempt == 2  # this problem lasted until step 1
    for i in (3, 4):
        run.batch(i)
    run.rollback.snapshot()  # the snapshot of step 2 is not after the problem
    assert run.rollback.trigger().attempt == 3
    run.batch(5)
    run.rollback.snapshot()
    assert run.rollback.trigger().attempt == 1
