"""Saving and loading `GuardedLR`, including pending verdicts."""

from __future__ import annotations

import copy

import pytest
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
)

from fastguard import GuardedLR, GuardedOptimizer, Warmup
from guardtest import longrun
from guardtest.scheduled import BAD, GOOD, guarded, play


def test_resume_is_exact() -> None:
    script = [GOOD, BAD, GOOD, GOOD, BAD, GOOD, GOOD, GOOD]

    def fresh() -> tuple[GuardedOptimizer, GuardedLR]:
        opt = guarded(momentum=0.9)
        warmup = Warmup(steps=5, lr=0.3, momentum=0.5)
        schedule = CosineAnnealingLR(opt, T_max=20)
        return opt, GuardedLR(schedule, backoff=0.5, recovery=2, floor=0.05, warmup=warmup)

    opt, lr = fresh()
    whole = play(opt, lr, script)
    first, first_lr = fresh()
    head = play(first, first_lr, script[:4])
    saved = copy.deepcopy((first.state_dict(), first_lr.state_dict()))
    second, second_lr = fresh()
    second.load_state_dict(saved[0])
    second_lr.load_state_dict(saved[1])
    assert head + play(second, second_lr, script[4:]) == whole


def test_a_loaded_state_is_complete_and_ignores_earlier_steps() -> None:
    opt = guarded(lr=1.0)
    lr = GuardedLR(ExponentialLR(opt, gamma=0.1), floor=0.05, backoff=0.5)
    lr.lower(0.9)
    play(opt, lr, [GOOD, BAD, GOOD])
    saved = copy.deepcopy(lr.state_dict())
    other = guarded(lr=1.0)
    resumed = GuardedLR(ExponentialLR(other, gamma=0.1), floor=0.05, backoff=0.5)
    for _ in range(3):
        other.step(loss=BAD)  # the schedule does not see this step before the load
    resumed.load_state_dict(saved)
    resumed.step()
    assert resumed.state_dict() == saved
    assert saved["lowered"] == 0.9 and saved["backoffs"] == 1 and saved["held_at_floor"] == 2


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays records as on a GPU: the record of step k arrives before step k + 1."""
    longrun.delay_records(monkeypatch)


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("script", [[GOOD] * 6, [GOOD, GOOD, BAD, GOOD, GOOD, BAD]], ids=str)
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_pending_verdict_is_part_of_the_state(script, optimizer_first: bool) -> None:
    def fresh() -> tuple[GuardedOptimizer, GuardedLR]:
        opt = guarded()
        return opt, GuardedLR(ExponentialLR(opt, gamma=0.5), backoff=0.5, recovery=2)

    opt, lr = fresh()
    whole = play(opt, lr, script)
    assert whole[0] == 1.0 and whole[1] == 0.5  # one step behind
    first, first_lr = fresh()
    head = play(first, first_lr, script[:3])
    saved = copy.deepcopy((first.state_dict(), first_lr.state_dict()))
    assert head + play(first, first_lr, script[3:]) == whole  # saving changed nothing
    second, second_lr = fresh()
    second.step(loss=BAD)  # has no effect on the loaded state
    if optimizer_first:
        second.load_state_dict(saved[0])
    second_lr.load_state_dict(saved[1])
    if not optimizer_first:
        second.load_state_dict(saved[0])
    assert second_lr.state_dict() == saved[1]
    assert head + play(second, second_lr, script[3:]) == whole


@pytest.mark.usefixtures("delayed")
def test_a_state_between_optimizer_and_schedule_step_is_complete() -> None:
    def fresh() -> tuple[GuardedOptimizer, GuardedLR]:
        opt = guarded()
        return opt, GuardedLR(ExponentialLR(opt, gamma=0.5))

    opt, lr = fresh()
    play(opt, lr, [GOOD] * 2)
    opt.step(loss=GOOD)
    saved = copy.deepcopy((opt.state_dict(), lr.state_dict()))
    other, other_lr = fresh()
    other.load_state_dict(saved[0])
    other_lr.load_state_dict(saved[1])
    for resumed in (lr, other_lr):
        resumed.step()
        assert resumed.get_last_lr() == [0.25]
        assert play(resumed.optimizer, resumed, [GOOD] * 2) == [0.125, 0.0625]


def test_a_state_without_verdicts_loads() -> None:
    opt = guarded()
    lr = GuardedLR(ExponentialLR(opt, gamma=0.5))
    saved = lr.state_dict()
    del saved["told"], saved["coming"]
    lr.load_state_dict(saved)
    assert play(opt, lr, [GOOD, GOOD]) == [0.5, 0.25]
