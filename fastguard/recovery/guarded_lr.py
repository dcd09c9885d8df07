"""`GuardedLR`: a learning-rate schedule that takes skipped steps into account.

    lr = max(floor, backoff_factor * schedule)          during warm-up:
    lr = max(floor, start + (backoff_factor * schedule - start) * n / steps)

Here n is the number of applied steps, and start the initial value of the warm-up. The schedule is
any torch scheduler, stepped as usual: once per step, once per epoch, or with a metric. Warm-up,
floor, back-off after an incident, and recovery follow the optimizer's steps and need no calls.
Recovery undoes one back-off after every `recovery` applied steps in a row. If the schedule falls
below the floor, the rate is clamped, which is counted, and logged the first time. A warm-up that
starts below the floor is clamped silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastguard.errors.checked_numbers import number_of
from fastguard.errors.logger import log
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.weak_hooks import hook_weakly
from fastguard.records.step_record import StepRecord
from fastguard.recovery.group_values import (
    LR,
    MOMENTUM,
    GroupValues,
    KnownGroups,
    are_captured,
    one_each,
)
from fastguard.recovery.schedule_arguments import (
    check_back_off,
    guarded_of,
    needs_metric,
    schedule_of,
)
from fastguard.recovery.step_counts import Counts, records_of, verdict_of
from fastguard.recovery.warmup import Warmup


class GuardedLR(LRScheduler):
    """Wraps a schedule, or holds a constant learning rate, for a `GuardedOptimizer`.

    Call `step` as often as you would call the schedule itself: after each optimizer step, once per
    epoch, or with each new metric for `ReduceLROnPlateau`. Warm-up, floor and back-off act before
    each optimizer step, however rarely `step` is called.

    With a fused optimizer on a GPU, whose steps do not sync, the verdict of step k takes effect in
    step k + 1, on all ranks alike. Tensor learning rates are updated in place.

    Other code, such as a second scheduler, may change the learning rates as well: the schedule
    changes by the same ratio. For code that sets them without regard to their current values, use
    `in_force`.

    A param group added later keeps its own learning rate and uses the last entry of a per-group
    `floor` or warm-up. Assign to `lr.floor[i]` to change its floor.

    Args:
        schedule: A torch scheduler created for the guarded optimizer (or for the optimizer inside
            it), or the guarded optimizer itself for a constant learning rate.
        optimizer: The guarded optimizer, if `schedule` does not refer to it. Default: None.
        floor: Lower bound of the learning rate, one for all param groups or one per group. Default:
            0.
        backoff: Factor applied after an incident (a skipped step, unless it only lowers a loss
            scale), in (0, 1]. Default: 1, no back-off.
        recovery: Applied steps in a row after which one back-off is undone; None: never.
        warmup: See `Warmup`; it counts optimizer steps, even if the schedule counts epochs.
            Default: None.

    Attributes:
        schedule: The wrapped scheduler.
        backoffs: Number of back-offs in force.
        clean_steps: Steps applied in a row since the last incident, back-off or recovery.
        applied_steps: Number of applied steps, which the warm-up counts.
        held_at_floor: How often the schedule was below the floor.

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
        # Does not call super().__init__(), which would take a first step.
        self.optimizer: GuardedOptimizer = guarded_of(schedule, optimizer)
        check_back_off(backoff, recovery, warmup)
        for i, group in enumerate(self._groups):
            LR.read(group, i)  # raises an error if there is no learning rate to schedule
        self.schedule: LRScheduler | ReduceLROnPlateau = schedule_of(schedule)
        self._floor: list[float] = []
        self._given_floor = floor
        self.backoff: float = float(backoff)
        self.recovery = recovery
        self.warmup = warmup
        self.backoffs: int = 0
        self.clean_steps: int = 0
        self.applied_steps: int = 0
        self.held_at_floor: int = 0
        self._lowered = 1.0  # product of the factors of `lower(factor)`
        self._needs_metric = needs_metric(self.schedule)
        self._is_due = False  # whether a step was applied since the schedule's last step
        self._is_behind = False  # whether values remain to be written
        self._learned: tuple[StepRecord | None, Counts] = (None, Counts())
        # Whether a trainer writes the learning rates, as happens between two `in_force` blocks.
        self._is_trainers_turn = False
        self._inbox = self.optimizer.subscribe()
        self._known = KnownGroups()
        self._lr, self._momentum = GroupValues(LR), GroupValues(MOMENTUM)
        self._start_lr: list[float] = []
        self._start_momentum: list[float] = []
        self._register_groups()
        if any(not f >= 0 for f in self._floor):
            raise ValueError(f"floor={floor!r} must be >= 0")
        self._set()
        hook_weakly(self.optimizer.register_step_pre_hook, self._follow)

    @property
    def floor(self) -> list[float]:
        """Lower bound of the learning rate of each param group; its entries may be assigned."""
        self._register_groups()  # a group may have been added since the last step
        return self._floor

    @floor.setter
    def floor(self, floor: list[float]) -> None:
        self._floor = floor

    @property
    def backoff_factor(self) -> float:
        """The factor by which incidents have reduced the schedule."""
        return self.backoff**self.backoffs

    @property
    def _factor(self) -> float:
        """The total factor on the schedule, by back-offs and `lower`."""
        return self.backoff_factor * self._lowered

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Steps the schedule if an optimizer step was applied since the last call.

        A schedule that uses a metric, such as `ReduceLROnPlateau`, steps if and only if a metric is
        passed.

        Args:
            args, kwargs: Arguments for the schedule's `step`: a metric, or the (fractional) epoch
                of `CosineAnnealingWarmRestarts`.
        """
        self._is_trainers_turn = False
        has_new_steps = self._catch_up()
        self._adopt_changed(wait=True)
        given = bool(args or kwargs)
        advances = given if self._needs_metric else self._is_due
        try:
            if advances:
                self._advance(*args, **kwargs)
                self._is_due = False
        finally:
            if has_new_steps or given or advances:
                self._set()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Wraps the optimizer step of a trainer that writes the learning rates itself.

        The values that the trainer has written to the param groups act as the schedule: inside the
        block, floor, back-off and warm-up are applied to them; after the block, the groups hold the
        trainer's values again. The trainer steps its own schedule as usual.

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
        self._lr.adopt_changed(self._groups)
        self._momentum.adopt_changed(self._groups)
        self._is_trainers_turn = False
        self._set()
        try:
            yield
        finally:
            self._register_groups()
            self._lr.restore(self._groups)
            if self._start_momentum:
                self._momentum.restore(self._groups)
            self._is_trainers_turn = True

    def lower(self, factor: float | None = None) -> None:
        """Backs off manually, as after an incident.

        Args:
            factor: A number in (0, 1) that multiplies the schedule permanently. None: multiply it
                by `backoff`, which recovery undoes as usual.
        """
        self._register_groups()
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
        """Returns the state as plain values. Waits for the verdict of the last step.

        It includes the wrapped schedule's state, and verdicts that were not acted on yet.
        """
        self._register_groups()
        if not self._is_trainers_turn:
            self._adopt_changed(wait=True)
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
            "told": [verdict_of(record) for record in self._inbox],
            "coming": [verdict_of(record) for record in self._inbox.coming()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict()` exactly.

        Raises:
            ValueError: The number of param groups differs; nothing was changed.
        """
        self._register_groups()
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
        self._inbox.clear()  # drops steps that are not part of the loaded run
        self._inbox.extend(records_of(state_dict.get("told", ())))
        self._inbox.expect(records_of(state_dict.get("coming", ())))
        self._show()
        self.held_at_floor = state_dict["held_at_floor"]  # set last, since `_show` may count again

    def _follow(self) -> None:
        """Applies warm-up and back-off before each optimizer step, without a call of `step`."""
        is_new = len(self.optimizer.param_groups) != len(self._lr.scheduled)
        due = self._inbox or is_new or self._is_behind
        if self._is_trainers_turn or not due or are_captured(self._groups):
            return
        self._catch_up()
        self._adopt_changed()
        self._set()

    def _adopt_changed(self, *, wait: bool = False) -> None:
        """Changes the schedule as other code has changed the values in the groups."""
        self._lr.rescale_changed(self._groups, self._floor, wait=wait)
        if self._start_momentum:
            self._momentum.adopt_changed(self._groups)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _catch_up(self) -> bool:
        """Processes the steps since the last call; returns whether values are to be written.

        After an interrupt, the next call continues.
        """
        self._register_groups()
        for _ in range(len(self._inbox)):
            self._is_behind = True
            self._learn(self._inbox[0])
            self._inbox.popleft()
        return self._is_behind

    def _learn(self, record: StepRecord) -> None:
        """Counts a step, and counts it only once if called again with the same record."""
        learned, counts = self._learned
        if learned is not record:
            before = Counts(self.backoffs, self.clean_steps, self.applied_steps, self._is_due)
            counts = before.after(record, self.backoff < 1.0, self.recovery)
            if counts.backoffs != before.backoffs:
                # Logged at the level of back-offs, since a log with only back-offs would mislead.
                what = "backed off" if counts.backoffs > before.backoffs else "recovered"
                factor = self.backoff**counts.backoffs * self._lowered
                message = f"GuardedLR: {what} to %g of the schedule after step %d"
                log.warning(message, factor, record.step)
            self._learned = record, counts
        self.backoffs, self.clean_steps, self.applied_steps, self._is_due = counts

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        """Steps the wrapped schedule, after restoring the values that it wrote itself."""
        self._lr.restore(self._groups)
        if self._start_momentum:
            self._momentum.restore(self._groups)
        try:
            self.schedule.step(*args, **kwargs)
        except Exception as error:
            if self._have_joined:
                error.add_note(
                    f"{type(self.schedule).__name__} may not accept param groups added later; "
                    "after add_param_group, create the schedule again, and a new GuardedLR with it"
                )
            raise
        self._lr.adopt(self._groups)
        self._momentum.adopt(self._groups)

    def _register_groups(self) -> None:
        """Registers param groups that were added since the last call."""
        groups = self._groups
        n, before = len(groups), len(self._lr.scheduled)
        self._known.check_same(groups)
        if n == before:
            return
        # Assigns to list ends, and to `_lr` last, so that the method can run again if interrupted.
        self._floor[before:] = one_each("floor", self._given_floor, before, n)
        if self.warmup is not None:
            self._start_lr[before:] = one_each("Warmup lr", self.warmup.lr, before, n)
            if self.warmup.momentum is not None:
                starts = one_each("Warmup momentum", self.warmup.momentum, before, n)
                self._start_momentum[before:] = starts
        self._have_joined, self._is_behind = before > 0, True
        self._known.join(groups, before)
        self._momentum.join(groups)
        self._lr.join(groups)
        if self._have_joined:
            log.info(
                "GuardedLR: param group %d was added with lr %g and floor %g; assign to "
                "lr.floor[%d] to change the floor of this group",
                n - 1, self._lr.scheduled[-1], self._floor[-1], n - 1,
            )  # fmt: skip

    def _show(self) -> None:
        """Writes the rates in force; while a trainer writes the groups, the scheduled rates."""
        if self._is_trainers_turn:
            self._lr.restore(self._groups)
        else:
            self._set()

    def _set(self) -> None:
        clamped = False
        warmup = self.warmup
        share = 1.0 if warmup is None else min(1.0, self.applied_steps / warmup.steps)
        factor = self._factor
        rates: list[float | None] = []
        for i, scheduled in enumerate(self._lr.scheduled):
            lr = wanted = scheduled * factor
            if share < 1.0:
                lr = self._start_lr[i] + (wanted - self._start_lr[i]) * share
            rates.append(max(self._floor[i], lr))  # NaN becomes the floor
            clamped |= wanted < self._floor[i]
        momenta: list[float | None] = []
        if self._start_momentum:
            pairs = zip(self._start_momentum, self._momentum.scheduled, strict=True)
            momenta = [b if b is None else a + (b - a) * share for a, b in pairs]
        self._lr.write(self._groups, rates)
        self._momentum.write(self._groups, momenta)
        self._is_behind = False
        if clamped and not self.held_at_floor:
            wished = [f"{lr * factor:.3g}" for lr in self._lr.scheduled]
            log.warning("GuardedLR: clamped lr %s to floor %s", wished, self._floor)
        self.held_at_floor += clamped
