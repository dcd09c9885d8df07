"""`GuardedLR`: a learning-rate schedule that knows of skipped steps.

    lr = max(floor, backoff_factor * schedule)          during the warm-up:
    lr = max(floor, start + (backoff_factor * schedule - start) * n / steps)

The schedule is any of torch's own; it advances only when a step reached the weights. An incident
multiplies `backoff_factor` by `backoff`, and each `recovery` applied steps in a row take one such
factor back. A schedule that wants below the floor is held there, once said and then counted; a
warm-up from below the floor is held there silently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from fastguard.optimizer import GuardedOptimizer
from fastguard.records import StepRecord

log = logging.getLogger("fastguard")


@dataclass(frozen=True, slots=True)
class Warmup:
    """A linear way from a start value to what the schedule says, over applied steps.

    Args:
        steps: How many applied steps it takes, >= 1.
        lr: Learning rate to start from, one for all param groups or one each; it may lie above what
            the schedule says: bias groups are often warmed from high to low.
        momentum: Momentum (beta1 for the Adam family) to start from, the same way; None leaves it.

    Example:
        >>> Warmup(steps=1000, lr=(0.1, 0.0, 0.0), momentum=0.8).steps
        1000
    """

    steps: int
    lr: float | Sequence[float] = 0.0
    momentum: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Warmup steps={self.steps!r} must be an integer >= 1")
        for name in ("lr", "momentum"):
            value = getattr(self, name)
            for v in value if isinstance(value, Sequence) else () if value is None else (value,):
                if not isinstance(v, int | float) or not 0 <= v < math.inf:
                    raise ValueError(f"Warmup {name}={value!r} must hold finite numbers >= 0")


class GuardedLR(LRScheduler):
    """Wraps a schedule, or holds a constant learning rate, for a `GuardedOptimizer`.

    Args:
        schedule: A scheduler of torch made for the guarded optimizer (or for the one inside it), or
            the guarded optimizer itself: then the learning rate is constant.
        optimizer: The guarded optimizer, if `schedule` does not know it.
        floor: No learning rate goes below, one for all param groups or one each.
        backoff: Factor at an incident (a skipped step, unless it only lowers a loss scale), in
            (0, 1]; 1 is off.
        recovery: Applied steps in a row after which one backoff is taken back; None: never.
        warmup: See `Warmup`.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

    On a road without synchronisation (fused optimizers on a GPU) it acts on the verdict of step k
    at step k + 1, on every rank alike. Tensor learning rates stay the tensors they are. A param
    group that is added later joins in with its own learning rate.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.1)
        >>> lr = fastguard.GuardedLR(schedule, floor=0.05, backoff=0.5, recovery=100)
        >>> for _ in range(3):
        ...     opt.step()
        ...     lr.step()
        >>> lr.get_last_lr(), lr.held_at_floor
        ([0.05], 2)
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
        # Not super().__init__(): that would take a first step of its own.
        self.optimizer = _guarded(schedule, optimizer)
        if isinstance(schedule, GuardedOptimizer):
            schedule = ConstantLR(schedule, factor=1.0)
        if not isinstance(schedule, LRScheduler | ReduceLROnPlateau):
            raise TypeError(
                f"schedule={schedule!r} must be a scheduler of torch.optim.lr_scheduler or a "
                "GuardedOptimizer"
            )
        if not (isinstance(backoff, int | float) and 0 < backoff <= 1):
            raise ValueError(f"backoff={backoff!r} must be a number in (0, 1]")
        if recovery is not None and (not isinstance(recovery, int) or recovery < 1):
            raise ValueError(f"recovery={recovery!r} must be None or an integer >= 1")
        if warmup is not None and not isinstance(warmup, Warmup):
            steps = warmup if isinstance(warmup, int) else "..."
            raise TypeError(
                f"warmup={warmup!r} must be a fastguard.Warmup, such as Warmup(steps={steps})"
            )
        self.schedule = schedule
        self._given_floor = floor
        self.backoff = float(backoff)
        self.recovery = recovery
        self.warmup = warmup
        self.backoffs = 0
        self.clean_steps = 0
        self.applied_steps = 0
        self.held_at_floor = 0
        self._inbox = self.optimizer.subscribe()
        self._scheduled: list[float] = []
        self._momenta: list[float | None] = []
        self._take_in_groups()
        if any(not f >= 0 for f in self.floor):
            raise ValueError(f"floor={floor!r} must be >= 0")
        self._set()

    @property
    def backoff_factor(self) -> float:
        """What incidents have multiplied the schedule by."""
        return self.backoff**self.backoffs

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Advances the schedule if a step reached the weights since the last call.

        Args:
            args, kwargs: What the wrapped schedule takes, such as the metric of
                `ReduceLROnPlateau`, which looks at a metric and not at steps and is always called.
        """
        records = self._catch_up()
        applied = any(record.action != "skipped" for record in records)
        if applied or isinstance(self.schedule, ReduceLROnPlateau):
            self._advance(*args, **kwargs)
        if records or args or kwargs:
            self._set()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Around the optimizer's step of a trainer that writes the learning rates itself.

        What the param groups hold counts as the schedule: inside the block floor, backoff and
        warm-up are applied to it, and after the block the groups hold it again. Use it instead of
        `step`; the wrapped schedule stays the trainer's to advance.

        Example:
            >>> import torch, fastguard
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
            >>> lr = fastguard.GuardedLR(opt, warmup=fastguard.Warmup(steps=10, lr=0.5))
            >>> opt.param_groups[0]["lr"] = 0.3     # a trainer at work
            >>> with lr.in_force():
            ...     opt.step()
            >>> opt.records()[0].lr, lr.get_last_lr()
            (0.5, [0.3])
        """
        self._catch_up()
        self._scheduled = [_number(g["lr"]) for g in self.optimizer.param_groups]
        self._set()
        try:
            yield
        finally:
            self._take_in_groups()
            for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
                _assign(group, "lr", lr)

    def lower(self, factor: float | None = None) -> None:
        """Backs off by hand, as after an incident.

        Args:
            factor: In (0, 1); None: `backoff`. Multiplies the schedule for good if it is given.
        """
        self._take_in_groups()
        if factor is None:
            self.backoffs += 1
            self.clean_steps = 0
        else:
            if not 0 < factor < 1:
                raise ValueError(f"factor={factor!r} must be a number in (0, 1)")
            self._lowered *= factor
        self._set()

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates in force, one a param group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the wrapped schedule's own state, and the verdicts yet to be acted on.

        Waits for the verdict of the last step.
        """
        self._take_in_groups()
        return {
            "schedule": self.schedule.state_dict(),
            "scheduled": list(self._scheduled),
            "momenta": list(self._momenta),
            "lowered": self._lowered,
            "backoffs": self.backoffs,
            "clean_steps": self.clean_steps,
            "applied_steps": self.applied_steps,
            "held_at_floor": self.held_at_floor,
            "told": [_told(record) for record in self._inbox],
            "coming": [_told(record) for record in self._inbox.coming()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes exactly.

        Raises:
            ValueError: It is of another number of param groups; nothing was changed.
        """
        self._take_in_groups()
        if len(state_dict["scheduled"]) != len(self._scheduled):
            raise ValueError(
                f"the schedule was saved with {len(state_dict['scheduled'])} param groups, but the "
                f"optimizer has {len(self._scheduled)}"
            )
        self.schedule.load_state_dict(state_dict["schedule"])
        self._scheduled = list(state_dict["scheduled"])
        self._momenta = list(state_dict["momenta"])
        self._lowered = state_dict["lowered"]
        self.backoffs = state_dict["backoffs"]
        self.clean_steps = state_dict["clean_steps"]
        self.applied_steps = state_dict["applied_steps"]
        self._inbox.clear()  # of steps that the loaded state knows nothing of
        self._inbox.extend(_records(state_dict.get("told", ())))
        self._inbox.expect(_records(state_dict.get("coming", ())))
        self._set()
        self.held_at_floor = state_dict["held_at_floor"]  # without this look at the floor

    _lowered = 1.0  # by hand, for good

    def _catch_up(self) -> list[StepRecord]:
        """Learns from the steps since the last call."""
        self._take_in_groups()
        records = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for record in records:
            self._learn(record)
        return records

    def _learn(self, record: StepRecord) -> None:
        if record.action == "skipped" and not record.is_incident:
            return
        if record.action == "skipped":
            self.clean_steps = 0
            if self.backoff < 1.0:
                self.backoffs += 1
                log.warning(
                    "GuardedLR: backed off to %g of the schedule after step %d",
                    self.backoff_factor * self._lowered,
                    record.step,
                )
            return
        self.applied_steps += 1
        self.clean_steps += 1
        if self.backoffs and self.recovery is not None and self.clean_steps >= self.recovery:
            self.backoffs -= 1
            self.clean_steps = 0

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        """One step of the wrapped schedule, which must find the values that it left, not ours."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self._scheduled, strict=True):
            _assign(group, "lr", lr)
        if self._start_momentum:
            self._set_momenta(self._momenta)
        self.schedule.step(*args, **kwargs)
        self._scheduled = [_number(g["lr"]) for g in groups]
        self._momenta = [_momentum(g) for g in groups]

    def _take_in_groups(self) -> None:
        """Gives every param group its place, also those that were added since."""
        groups = self.optimizer.param_groups
        n, before = len(groups), len(self._scheduled)
        if n == before:
            return
        self.floor = _each("floor", self._given_floor, n)
        self._start_lr, self._start_momentum = [], []
        if self.warmup is not None:
            self._start_lr = _each("Warmup lr", self.warmup.lr, n)
            if self.warmup.momentum is not None:
                self._start_momentum = _each("Warmup momentum", self.warmup.momentum, n)
        self._scheduled += [_number(g["lr"]) for g in groups[before:]]
        self._momenta += [_momentum(g) for g in groups[before:]]

    def _set(self) -> None:
        held = False
        share = 1.0
        if self.warmup is not None:
            share = min(1.0, self.applied_steps / self.warmup.steps)
        factor = self.backoff_factor * self._lowered
        for i, group in enumerate(self.optimizer.param_groups):
            lr = wanted = self._scheduled[i] * factor
            if share < 1.0:
                lr = self._start_lr[i] + (wanted - self._start_lr[i]) * share
            _assign(group, "lr", max(self.floor[i], lr))  # a NaN becomes the floor
            held |= wanted < self.floor[i]
        if self._start_momentum:
            pairs = zip(self._start_momentum, self._momenta, strict=True)
            self._set_momenta([a if b is None else a + (b - a) * share for a, b in pairs])
        if held:
            if not self.held_at_floor:
                log.warning(
                    "GuardedLR: the schedule wanted lr %s, below the floor %s: held there",
                    [f"{lr * factor:.3g}" for lr in self._scheduled],
                    self.floor,
                )
            self.held_at_floor += 1

    def _set_momenta(self, momenta: Sequence[float | None]) -> None:
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=True):
            if momentum is None:
                continue
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = momentum


def _guarded(schedule: Any, optimizer: Any) -> GuardedOptimizer:
    found = optimizer or (
        schedule if isinstance(schedule, GuardedOptimizer) else getattr(schedule, "optimizer", None)
    )
    if not isinstance(found, GuardedOptimizer):
        raise TypeError(
            "GuardedLR needs the GuardedOptimizer to know which steps were applied; make the "
            "scheduler for it, or pass GuardedLR(scheduler, optimizer=guarded)"
        )
    return found


def _each(name: str, value: float | Sequence[float], n: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * n
    if isinstance(value, str) or not all(isinstance(v, Real) for v in values):
        raise TypeError(f"{name}={value!r} must be a number >= 0, or one for each param group")
    if len(values) != n:
        raise ValueError(f"{name}={value!r} has {len(values)} entries for {n} param groups")
    return [float(v) for v in values]


def _told(record: StepRecord) -> list[Any]:
    """As much of a record as the schedule acts on."""
    return [record.step, record.action, record.reason]


def _records(told: Sequence[Sequence[Any]]) -> list[StepRecord]:
    """The records again; those that were saved without a reason are incidents if skipped."""
    return [StepRecord(step, math.nan, math.nan, action, *reason) for step, action, *reason in told]


def _number(lr: float | Tensor) -> float:
    return float(lr)  # waits if the learning rate is a tensor on a GPU


def _momentum(group: dict[str, Any]) -> float | None:
    if "betas" in group:
        return float(group["betas"][0])
    return float(group["momentum"]) if "momentum" in group else None


def _assign(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value
