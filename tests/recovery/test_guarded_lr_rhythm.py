"""`GuardedLR` with a schedule that is not stepped once per optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fastguard import GuardedLR, GuardedOptimizer, Warmup
from fastguard.errors.versions import TENSOR_PLATEAU
from guardtest import longrun
from guardtest.scheduled import BAD, GOOD, guarded
from guardtest.versions import needs

EPOCHS, BATCHES = 4, 4
WARMUP = Warmup(steps=6, lr=0.25)


def plateau(opt) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(opt, patience=0, factor=0.1)


class ByAccuracy(LRScheduler):
    """A custom schedule whose `step` requires a metric."""

    factor = 1.0

    def _initial_step(self) -> None:
        self._step_count = 0
        super().step()

    def get_lr(self) -> list[float]:
        return [self.factor * base for base in self.base_lrs]

    def step(self, accuracy: float) -> None:  # type: ignore[override]
        self.factor *= 0.5
        super().step()


SCHEDULES: dict[str, tuple[Callable, tuple]] = {
    "plateau": (plateau, (1.0,)),
    "own-metric": (ByAccuracy, (0.7,)),
    "step": (lambda o: StepLR(o, 2, gamma=0.5), ()),
    "lambda": (lambda o: LambdaLR(o, lambda n: 0.5**n), ()),
    "cosine": (lambda o: CosineAnnealingLR(o, EPOCHS), ()),
    "restarts": (lambda o: CosineAnnealingWarmRestarts(o, 3), ()),
    "sequential": (
        lambda o: SequentialLR(o, [ConstantLR(o, 0.5, 1), ExponentialLR(o, 0.5)], [2]),
        (),
    ),
    "chained": (lambda o: ChainedScheduler([ConstantLR(o, 0.5, 2), ExponentialLR(o, 0.5)]), ()),
}


def alone(make: Callable, arguments: tuple) -> list[float]:
    """Returns the learning rates of torch's schedule, one per epoch."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = make(opt), []
    for _ in range(EPOCHS):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step(*arguments)
    return seen


def warmed(by_epoch: list[float]) -> list[float]:
    """Returns the learning rate of each batch, with the warm-up."""
    wanted = [lr for lr in by_epoch for _ in range(BATCHES)]
    shares = [min(1.0, n / WARMUP.steps) for n in range(len(wanted))]
    return [WARMUP.lr + (lr - WARMUP.lr) * share for lr, share in zip(wanted, shares, strict=True)]


def lr_in_force(opt: GuardedOptimizer) -> list[float]:
    return [record.lr for record in opt.flush()]


def by_itself(opt: GuardedOptimizer, lr: GuardedLR) -> None:
    opt.step()


def every_batch(opt: GuardedOptimizer, lr: GuardedLR) -> None:
    opt.step()
    lr.step()


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (way, name)
        for way in ("by itself", "every batch", "in force")
        for name, (_, arguments) in SCHEDULES.items()
        if arguments or way != "every batch"  # a schedule without a metric counts every call
    ],
)
def test_a_warm_up_by_step_and_a_schedule_by_epoch(way: str, name: str) -> None:
    make, arguments = SCHEDULES[name]
    opt = guarded()
    schedule = make(opt)
    lr = GuardedLR(schedule, warmup=WARMUP)
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            if way == "in force":
                with lr.in_force():
                    opt.step()
            else:
                {"by itself": by_itself, "every batch": every_batch}[way](opt, lr)
        if way == "in force":
            schedule.step(*arguments)
        else:
            lr.step(*arguments)
    assert lr_in_force(opt) == pytest.approx(warmed(alone(make, arguments)))


@needs(TENSOR_PLATEAU)
def test_a_tensor_learning_rate_warms_up_in_place() -> None:
    rate = torch.tensor(1.0)
    p = torch.nn.Parameter(torch.zeros(1))
    opt = GuardedOptimizer(torch.optim.AdamW([p], lr=rate, fused=True))
    lr = GuardedLR(plateau(opt), warmup=WARMUP)
    for epoch in range(EPOCHS):
        for _ in range(BATCHES):
            # The context can be entered repeatedly.
            with lr.in_force() if epoch == 1 else torch.no_grad():
                opt.step()
        lr.step(1.0)
    assert opt.param_groups[0]["lr"] is rate
    assert lr_in_force(opt) == pytest.approx(warmed(alone(plateau, (1.0,))), rel=1e-6)


def test_fractions_of_an_epoch_at_each_batch() -> None:
    plain, opt = guarded(), guarded()
    bare = CosineAnnealingWarmRestarts(plain, 2)
    lr = GuardedLR(CosineAnnealingWarmRestarts(opt, 2), warmup=Warmup(steps=1, lr=1.0))
    for epoch in range(4):
        for batch in range(3):
            plain.step()
            opt.step()
            bare.step(epoch + (batch + 1) / 3)
            lr.step(epoch + (batch + 1) / 3)
            assert lr.get_last_lr() == pytest.approx(bare.get_last_lr())


def test_an_epoch_of_skips_only_holds_the_schedule_but_no_metric() -> None:
    for make, arguments, expected in ((StepLR, (), 1.0), (plateau, (1.0,), 0.1)):
        opt = guarded()
        lr = GuardedLR(make(opt, 1) if make is StepLR else make(opt))
        lr.step(*arguments)
        for _ in range(3):
            opt.step(loss=BAD)
        lr.step(*arguments)
        assert lr.get_last_lr() == pytest.approx([expected])


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("way", [by_itself, every_batch])
def test_a_backoff_follows_the_steps_in_any_rhythm(
    way, delayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if delayed:
        longrun.delay_records(monkeypatch)
    opt = guarded()
    lr = GuardedLR(plateau(opt), backoff=0.5, recovery=2)
    for loss in (GOOD, BAD, GOOD, GOOD, GOOD, GOOD):
        opt.observe(loss)
        way(opt, lr)
    late = [1.0] * delayed
    assert lr_in_force(opt) == [*late, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0][:6]


def test_a_state_between_calls_of_step_is_complete() -> None:
    def fresh() -> tuple[GuardedOptimizer, GuardedLR]:
        opt = guarded()
        return opt, GuardedLR(StepLR(opt, 1, gamma=0.5), warmup=WARMUP, backoff=0.5)

    def run(opt: GuardedOptimizer, lr: GuardedLR, batches: range) -> list[float]:
        for i in batches:
            opt.step(loss=BAD if i in (3, 7) else GOOD)
            if i % 4 == 3:
                lr.step()
        return lr_in_force(opt)

    whole = run(*fresh(), range(12))
    for stop in (1, 2, 3, 4, 7, 8, 9):
        first, first_lr = fresh()
        head = run(first, first_lr, range(stop))
        saved = copy.deepcopy((first.state_dict(), first_lr.state_dict()))
        opt, lr = fresh()
        opt.load_state_dict(saved[0])
        lr.load_state_dict(saved[1])
        assert head + run(opt, lr, range(stop, 12)) == whole, stop


def test_a_manual_warmup_between_calls_of_step_acts_as_on_the_bare_schedule() -> None:
    opt = guarded(momentum=0.9)
    lr = GuardedLR(StepLR(opt, 1, gamma=0.5), floor=0.01)
    for i in range(4):
        opt.param_groups[0]["lr"] = 0.2 * (i + 1)
        opt.step()
    lr.step()
    opt.step()
    assert lr_in_force(opt) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.4])


BY_BATCH: dict[str, Callable] = {
    "cosine": lambda o: CosineAnnealingLR(o, 20),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "step": lambda o: StepLR(o, 3, gamma=0.5),
    "lambda": lambda o: LambdaLR(o, lambda n: 0.9**n),
    "cycle": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("name", BY_BATCH)
def test_a_second_scheduler_beside_the_wrapped_one_acts_as_in_torch(name: str) -> None:
    plain, opt = guarded(), guarded()
    bare, beside_bare = BY_BATCH[name](plain), plateau(plain)
    lr, beside = GuardedLR(BY_BATCH[name](opt), backoff=0.5, floor=1e-9), plateau(opt)
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            plain.step()
            opt.step()
            bare.step()
            lr.step()
        beside_bare.step(1.0)
        beside.step(1.0)
    assert lr_in_force(opt) == pytest.approx(lr_in_force(plain))


def test_a_state_includes_what_a_second_scheduler_has_just_written() -> None:
    def fresh() -> tuple:
        opt = guarded()
        return opt, GuardedLR(ExponentialLR(opt, 0.9), warmup=WARMUP), plateau(opt)

    def run(opt: GuardedOptimizer, lr: GuardedLR, beside: ReduceLROnPlateau, steps: range) -> list:
        for i in steps:
            opt.step()
            lr.step()
            if i % 4 == 3:
                beside.step(1.0)
        return lr_in_force(opt)

    whole = run(*fresh(), range(12))
    for stop in (4, 7, 8, 9):
        first = fresh()
        head = run(*first, range(stop))
        saved = copy.deepcopy([each.state_dict() for each in first])
        second = fresh()
        for each, state in zip(second, saved, strict=True):
            each.load_state_dict(state)
        assert head + run(*second, range(stop, 12)) == pytest.approx(whole), stop


def test_a_second_scheduler_acts_during_a_warm_up_without_a_call_of_step() -> None:
    opt = guarded()
    lr, beside = GuardedLR(opt, warmup=WARMUP), plateau(opt)
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            opt.step()
        beside.step(1.0)
    assert lr_in_force(opt) == pytest.approx(warmed(alone(plateau, (1.0,))))
    assert lr.held_at_floor == 0


def test_a_second_scheduler_and_a_backoff_multiply() -> None:
    opt = guarded()
    lr, beside = GuardedLR(opt, backoff=0.5, recovery=3), plateau(opt)
    for i in range(12):
        opt.step(loss=BAD if i in (1, 7) else GOOD)
        if i % 4 == 3:
            beside.step(1.0)
    expected = [1.0, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 0.05, 0.05, 0.05, 0.1]
    assert lr_in_force(opt) == pytest.approx(expected)
    assert lr.get_last_lr() == pytest.approx([0.01])


def test_a_rate_written_under_a_backoff_does_not_raise_the_schedule_beyond_it() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5, recovery=2)
    opt.step(loss=BAD)
    opt.step()
    opt.param_groups[0]["lr"] = 0.7  # 0.5 is in force
    for _ in range(3):
        opt.step()
    assert lr_in_force(opt) == [1.0, 0.5, 0.5, 1.0, 1.0]
    opt.param_groups[0]["lr"] = 3.0
    opt.step()
    assert lr.get_last_lr() == [3.0]


def test_a_trainer_that_sets_momentum_finds_its_value_again() -> None:
    opt = guarded(momentum=0.9)
    lr = GuardedLR(opt, warmup=Warmup(steps=2, lr=0.0, momentum=0.5))
    seen = []
    for theirs in (0.9, 0.8, 0.8):
        if theirs != 0.9:
            opt.param_groups[0]["momentum"] = theirs
        with lr.in_force():
            seen.append(opt.param_groups[0]["momentum"])
            opt.step()
        assert opt.param_groups[0]["momentum"] == theirs
    assert seen == pytest.approx([0.5, 0.65, 0.8])


def test_a_step_outside_the_block_uses_the_trainers_values() -> None:
    opt = guarded()
    lr = GuardedLR(opt, backoff=0.5)
    with lr.in_force():
        opt.step(loss=BAD)
    opt.param_groups[0]["lr"] = 0.7
    opt.step()
    with lr.in_force():
        opt.step()
    assert lr_in_force(opt) == [1.0, 0.7, 0.35]


def test_lowering_between_two_blocks_is_not_taken_for_a_trainers_value() -> None:
    opt = guarded()
    schedule = plateau(opt)
    lr = GuardedLR(schedule)
    with lr.in_force():
        opt.step()
    saved = copy.deepcopy(lr.state_dict())
    lr.lower(0.5)  # as a rollback does
    assert lr.get_last_lr() == [1.0]
    for _ in range(2):
        schedule.step(1.0)
    with lr.in_force():
        opt.step()
    lr.load_state_dict(saved)
    assert lr.get_last_lr() == [1.0]
    with lr.in_force():
        opt.step()
    assert lr_in_force(opt) == pytest.approx([1.0, 0.05, 1.0])


def test_a_cycle_by_step_under_a_longer_warm_up() -> None:
    plain, opt = guarded(momentum=0.9), guarded(momentum=0.9)
    bare = OneCycleLR(plain, max_lr=1.0, total_steps=20)
    lr = GuardedLR(OneCycleLR(opt, max_lr=1.0, total_steps=20), warmup=WARMUP)
    wanted = []
    for _ in range(12):
        wanted.append(plain.param_groups[0]["lr"])
        for optimizer, schedule in ((plain, bare), (opt, lr)):
            optimizer.step()
            schedule.step()
    expected = [0.25 + (w - 0.25) * min(1.0, n / 6) for n, w in enumerate(wanted)]
    assert lr_in_force(opt) == pytest.approx(expected)


def test_a_wrong_argument_leaves_the_learning_rate_in_force() -> None:
    opt = guarded()
    lr = GuardedLR(ChainedScheduler([ExponentialLR(opt, 0.5)]), backoff=0.5)
    opt.step(loss=BAD)
    opt.step()
    for _ in range(2):
        with pytest.raises(TypeError, match="positional argument"):
            lr.step(1.0)
        assert lr.get_last_lr() == [0.5]
    lr.step()
    assert lr.get_last_lr() == [0.25]


def test_a_deleted_schedule_changes_nothing() -> None:
    opt = guarded()
    lr = GuardedLR(opt, warmup=WARMUP)
    del lr
    opt.param_groups[0]["lr"] = 0.7
    for _ in range(3):
        opt.step()
    assert lr_in_force(opt) == [0.7] * 3
