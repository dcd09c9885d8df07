"""`GuardedLR`: a learning-rate schedule that takes skipped steps into account.

    lr = max(floor, backoff_factor * schedule)          during warm-up:
    lr = max(floor, start + (backoff_factor * schedule - start) * n / steps)

The schedule is any scheduler of torch, stepped as usual: once per step, once per epoch, or with a
metric. Everything else follows the optimizer's steps automatically: warm-up, floor, back-off after
an incident, and recovery by one factor per `recovery` applied steps in a row. A schedule below the
floor is clamped to it, which is logged once and then counted; a warm-up from below the floor is
clamped silently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastguard.errors.checked_numbers import number_of
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.weak_hooks import hook_weakly
from fastguard.records.step_record import StepRecord
from fastguard.recovery.group_values import LR, MOMENTUM, GroupValues, one_each
from fastguard.recovery.schedule_arguments import (
    check_back_off,
    guarded_of,
    looks_at_metrics,
    schedule_of,
)
from fastguard.recovery.warmup import Warmup

log: logging.Logger = logging.getLogger("fastguard")


class GuardedLR(LRScheduler):
    """Wraps a schedule, or holds a constant learning rate, for a `GuardedOptimizer`.

    Call `step` as often as you would call the schedule itself: after each optimizer step, once per
    epoch, or with each new metric for `ReduceLROnPlateau`. Warm-up, floor and back-off act before
    each optimizer step, however rarely `step` is called.

    On a path without synchronisation (fused optimizers on a GPU), it acts on the verdict of step k
    at step k + 1, on every rank alike. Tensor learning rates remain the same tensors.

    A param group added later joins with its own learning rate; it uses the last entry of a
    per-group `floor` or warm-up. Assign to `lr.floor[i]` for another floor.

    Args:
        schedule: A torch scheduler created for the guarded optimizer (or for the optimizer inside
            it), or the guarded optimizer itself for a constant learning rate.
        optimizer: The guarded optimizer, if `schedule` does not refer to it. Default: None.
        floor: Lower bound of the learning rate, one for all param groups or one per group. Default:
            0.
        backoff: Factor applied after an incident (a skipped step, unless it only lowers a loss
            scale), in (0, 1]. Default: 1, no back-off.
        recovery: Applied steps in a row after which one back-off is undone; None: never.
        warmup: See `Warmup`; it counts optimizer steps, whatever the schedule counts. Default:
            None.

    Raises:
        TypeError, ValueError: An argument has an invalid type or value.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        >>> plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.1)
        >>> lr = fastguard.GuardedLR(plateau, warmup=fastguard.Warmup(steps=2))
        >>> for epoch in range(3):
        ...     for batch in range(2):
        ...         opt.step()              # warms up per step
        ...     lr.step(1.0)                # uses the validation loss per epoch
        >>> [record.lr for record in opt.records()]
        [0.0, 0.5, 1.0, 1.0, 0.1, 0.1]
    """

    def __init__(
        self,
        schedule: LRScheduler | ReduceLROnPlateau | GuardedOptimizer,
        *,
        optimizer: GuardedOptimizer | None = None,
        floor: float | Sequence[float] = 0.0,
        backoff: float = 1.0,
        recovery: int | None = None,
        warmup: Warmup | None = None,
    ) -> None:
        # Not super().__init__(), which would take a first step.
        self.optimizer: GuardedOptimizer = guarded_of(schedule, optimizer)
        check_back_off(backoff, recovery, warmup)
        for group in self._groups:
            LR.read(group)  # raises if there is no learning rate to schedule
        self.schedule: LRScheduler | ReduceLROnPlateau = schedule_of(schedule)
        self.floor: list[float] = []
        self._given_floor = floor
        self.backoff: float = float(backoff)
        self.recovery = recovery
        self.warmup = warmup
        self.backoffs: int = 0
        self.clean_steps: int = 0
        self.applied_steps: int = 0
        self.held_at_floor: int = 0
        self._looks_at_metrics = looks_at_metrics(self.schedule)
        self._is_due = False  # a step was applied since the schedule's last step
        self._is_others = False  # between two blocks of `in_force` the trainer owns the groups
        self._inbox = self.optimizer.subscribe()
        self._lr, self._momentum = GroupValues(LR), GroupValues(MOMENTUM)
        self._start_lr: list[float] = []
        self._start_momentum: list[float] = []
        self._take_in_groups()
        if any(not f >= 0 for f in self.floor):
            raise ValueError(f"floor={floor!r} must be >= 0")
        self._set()
        hook_weakly(self.optimizer.register_step_pre_hook, self._follow)

    @property
    def backoff_factor(self) -> float:
        """The factor by which incidents have reduced the schedule."""
        return self.backoff**self.backoffs

    @property
    def _factor(self) -> float:
        """The factor on the schedule: of the back-offs and of `lower`."""
        return self.backoff_factor * self._lowered

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Advances the schedule by one if a step was applied since the last call.

        A schedule that uses a metric, such as `ReduceLROnPlateau`, advances whenever it is given
        one; without one it waits for the next call.

        Args:
            args, kwargs: Arguments of the wrapped schedule: a metric, or the (fractional) epoch of
                `CosineAnnealingWarmRestarts`.
        """
        self._is_others = False
        learned = self._catch_up()
        given = bool(args or kwargs)
        advances = given if self._looks_at_metrics else self._is_due
        try:
            if advances:
                self._advance(*args, **kwargs)
                self._is_due = False
        finally:
            if learned or given or advances:
                self._set()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Wraps the optimizer step of a trainer that writes the learning rates itself.

        The values that the trainer writes to the param groups act as the schedule: inside the
        block, floor, back-off and warm-up are applied to them; afterwards the groups hold them
        again. The trainer advances its own schedule as it likes.

        Example:
            >>> import torch, fastguard
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
            >>> lr = fastguard.GuardedLR(opt, warmup=fastguard.Warmup(steps=10, lr=0.5))
            >>> opt.param_groups[0]["lr"] = 0.3     # written by a trainer
            >>> with lr.in_force():
            ...     opt.step()
            >>> opt.records()[0].lr, lr.get_last_lr()
            (0.5, [0.3])
        """
        self._catch_up()
        groups = self.optimizer.param_groups
        self._lr.take_over_changed(groups)
        self._momentum.take_over_changed(groups)
        self._is_others = False
        self._set()
        try:
            yield
        finally:
            self._take_in_groups()
            self._lr.put_back(groups := self.optimizer.param_groups)
            if self._start_momentum:
                self._momentum.put_back(groups)
            self._is_others = True

    def lower(self, factor: float | None = None) -> None:
        """Backs off manually, as after an incident.

        Args:
            factor: A number in (0, 1) that multiplies the schedule permanently; None: `backoff`,
                from which the rate recovers as usual.
        """
        self._take_in_groups()
        if factor is None:
            self.backoffs += 1
            self.clean_steps = 0
        else:
            if not 0 < number_of("factor", factor, "use a number in (0, 1)") < 1:
                raise ValueError(f"factor={factor!r} must be a number in (0, 1)")
            self._lowered *= factor
        self._show()

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the learning rates in force, one per param group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values: the wrapped schedule's state and the verdicts still to be acted on.

        Waits for the verdict of the last step.
        """
        self._take_in_groups()
        return {
            "schedule": self.schedule.state_dict(),
            "scheduled": list(self._lr.scheduled),
            "momenta": list(self._momentum.scheduled),
            "lowered": self._lowered,
            "backoffs": self.backoffs,
            "clean_steps": self.clean_steps,
            "applied_steps": self.applied_steps,
            "held_at_floor": self.held_at_floor,
            "is_due": self._is_due,
            "told": [_as_told(record) for record in self._inbox],
            "coming": [_as_told(record) for record in self._inbox.coming()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict()` exactly.

        Raises:
            ValueError: It has another number of param groups; nothing was changed.
        """
        self._take_in_groups()
        n, saved = len(self._lr.scheduled), len(state_dict["scheduled"])
        if saved != n:
            raise ValueError(
                f"the schedule was saved with {saved} param groups, but the optimizer has {n}; "
                f"load it when the optimizer has {saved}: {'before' if saved < n else 'after'} "
                "add_param_group"
            )
        self.schedule.load_state_dict(state_dict["schedule"])
        self._lr.scheduled = list(state_dict["scheduled"])
        self._momentum.scheduled = list(state_dict["momenta"])
        self._lowered = state_dict["lowered"]
        self.backoffs = state_dict["backoffs"]
        self.clean_steps = state_dict["clean_steps"]
        self.applied_steps = state_dict["applied_steps"]
        self._is_due = state_dict.get("is_due", False)
        self._inbox.clear()  # these steps are unknown to the loaded state
        self._inbox.extend(_records(state_dict.get("told", ())))
        self._inbox.expect(_records(state_dict.get("coming", ())))
        self._show()
        self.held_at_floor = state_dict["held_at_floor"]  # absent before there was a floor

    _lowered = 1.0  # by `lower(factor)`, permanently

    def _follow(self) -> None:
        """Runs before each optimizer step, so that warm-up and back-off need no call of `step`.

        Values that others have written since are not changed, for as long as they set the rate.
        """
        is_new = len(self.optimizer.param_groups) != len(self._lr.scheduled)
        if self._is_others or not (self._inbox or is_new) or self._is_captured():
            return
        self._catch_up()
        self._set(unless_changed=True)

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is capturing the step, which would freeze this value for all
        replays."""
        on_gpu = any(isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in self._groups)
        return on_gpu and torch.cuda.is_current_stream_capturing()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _catch_up(self) -> bool:
        """Processes the steps since the last call; returns whether there were any."""
        self._take_in_groups()
        n = len(self._inbox)
        for _ in range(n):
            self._learn(self._inbox.popleft())
        return n > 0

    def _learn(self, record: StepRecord) -> None:
        if record.action == "skipped":
            if not record.is_incident:
                return
            self.clean_steps = 0
            if self.backoff < 1.0:
                self.backoffs += 1
                self._say("backed off to %g of the schedule after step %d", record)
            return
        self._is_due = True
        self.applied_steps += 1
        self.clean_steps += 1
        if self.backoffs and self.recovery is not None and self.clean_steps >= self.recovery:
            self.backoffs -= 1
            self.clean_steps = 0
            self._say("recovered to %g of the schedule after step %d", record)

    def _say(self, what: str, record: StepRecord) -> None:
        # Recovery is logged at the same level, since showing only the back-off would mislead.
        log.warning("GuardedLR: " + what, self._factor, record.step)

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        """Steps the wrapped schedule, which must find the values it wrote, not ours."""
        self._lr.put_back(self._groups)
        if self._start_momentum:
            self._momentum.put_back(self._groups)
        try:
            self.schedule.step(*args, **kwargs)
        except Exception as error:
            if self._have_joined:
                error.add_note(
                    f"{type(self.schedule).__name__} may not accept param groups added later; "
                    "after add_param_group, create the schedule again, and a new GuardedLR with it"
                )
            raise
        self._lr.take_over(self._groups)
        self._momentum.take_over(self._groups)

    def _take_in_groups(self) -> None:
        """Registers every param group, including those added since."""
        groups = self._groups
        n, before = len(groups), len(self._lr.scheduled)
        if n == before:
            return
        if n < before:
            raise ValueError(
                f"the optimizer has {n} param groups, but GuardedLR has {before}; after removing "
                "a param group, create a new GuardedLR"
            )
        floors = one_each("floor", self._given_floor, before, n)
        if self.warmup is not None:
            self._start_lr += one_each("Warmup lr", self.warmup.lr, before, n)
            if self.warmup.momentum is not None:
                starts = one_each("Warmup momentum", self.warmup.momentum, before, n)
                self._start_momentum += starts
        self.floor += floors
        self._lr.join(groups)
        self._momentum.join(groups)
        self._have_joined = before > 0
        if self._have_joined:
            log.info(
                "GuardedLR: param group %d joins with lr %g and floor %g; assign to lr.floor[%d] "
                "to change its floor",
                n - 1, self._lr.scheduled[-1], self.floor[-1], n - 1,
            )  # fmt: skip

    def _show(self) -> None:
        """Updates the groups, unless they belong to a trainer between two blocks of `in_force`."""
        if self._is_others:
            self._lr.put_back(self._groups)
        else:
            self._set()

    def _set(self, *, unless_changed: bool = False) -> None:
        held = False
        share = 1.0
        if self.warmup is not None:
            share = min(1.0, self.applied_steps / self.warmup.steps)
        factor = self._factor
        rates: list[float | None] = []
        for i, scheduled in enumerate(self._lr.scheduled):
            lr = wanted = scheduled * factor
            if share < 1.0:
                lr = self._start_lr[i] + (wanted - self._start_lr[i]) * share
            rates.append(max(self.floor[i], lr))  # a NaN becomes the floor
            held |= wanted < self.floor[i]
        momenta: list[float | None] = []
        if self._start_momentum:
            pairs = zip(self._start_momentum, self._momentum.scheduled, strict=True)
            momenta = [b if b is None else a + (b - a) * share for a, b in pairs]
        if unless_changed:
            self._lr.leave_changed(self._groups, rates)
            self._momentum.leave_changed(self._groups, momenta)
        self._lr.write(self._groups, rates)
        self._momentum.write(self._groups, momenta)
        if held:
            self._say_held(factor)

    def _say_held(self, factor: float) -> None:
        if not self.held_at_floor:
            log.warning(
                "GuardedLR: clamped lr %s to floor %s",
                [f"{lr * factor:.3g}" for lr in self._lr.scheduled],
                self.floor,
            )
        self.held_at_floor += 1


def _as_told(record: StepRecord) -> list[Any]:
    """Returns the part of a record that the schedule acts on."""
    return [record.step, record.action, record.reason]


def _records(told: Sequence[Sequence[Any]]) -> list[StepRecord]:
    return [StepRecord(step, math.nan, math.nan, *rest) for step, *rest in told]
