"""Validates the arguments of `GuardedLR`."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from fastguard.errors.checked_numbers import count_of, number_of
from fastguard.errors.plain_text import shown
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.recovery.warmup import Warmup


def guarded_of(schedule: Any, optimizer: Any) -> GuardedOptimizer:
    """Returns the guarded optimizer: `optimizer`, `schedule`, or the optimizer of `schedule`.

    Raises:
        TypeError: None of them is a `GuardedOptimizer`.
    """
    found = optimizer
    if found is None:
        guarded = isinstance(schedule, GuardedOptimizer)
        found = schedule if guarded else getattr(schedule, "optimizer", None)
    if not isinstance(found, GuardedOptimizer):
        raise TypeError(
            "GuardedLR needs the GuardedOptimizer to know which steps were applied; create the "
            "scheduler for it, or pass GuardedLR(scheduler, optimizer=guarded)"
        )
    return found


def schedule_of(schedule: Any) -> LRScheduler | ReduceLROnPlateau:
    """Returns the schedule to wrap; for a guarded optimizer, a constant one.

    Raises:
        TypeError: The argument is neither a scheduler nor a guarded optimizer.
    """
    if isinstance(schedule, GuardedOptimizer):
        return ConstantLR(schedule, factor=1.0)
    if not isinstance(schedule, LRScheduler | ReduceLROnPlateau):
        raise TypeError(
            f"schedule={shown(schedule)} must be a scheduler of torch.optim.lr_scheduler or a "
            "GuardedOptimizer; for another kind of scheduler that writes the learning rates "
            "itself, take each optimizer step in `with GuardedLR(optimizer, ...).in_force():`"
        )
    return schedule


def needs_metric(schedule: LRScheduler | ReduceLROnPlateau) -> bool:
    """Whether the schedule's `step` requires a metric."""
    try:
        inspect.signature(schedule.step).bind()
    except TypeError:
        return True
    return isinstance(schedule, ReduceLROnPlateau)


def check_back_off(backoff: object, recovery: object, warmup: object) -> None:
    """Raises a TypeError or ValueError for invalid arguments of `GuardedLR`."""
    if not 0 < number_of("backoff", backoff, "use a number in (0, 1]") <= 1:
        raise ValueError(f"backoff={shown(backoff)} must be a number in (0, 1]")
    if recovery is not None:
        count_of("recovery", recovery, 1, optional=True)
    if warmup is not None and not isinstance(warmup, Warmup):
        steps = shown(warmup) if isinstance(warmup, int) else "..."
        raise TypeError(
            f"warmup={shown(warmup)} must be a fastguard.Warmup, such as Warmup(steps={steps})"
        )
