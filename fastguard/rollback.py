"""`Rollback`: when skipping is not enough, go back to the last good state, within the process.

Every `every` applied clean steps the state of model, optimizer and whatever else has a `state_dict`
is copied to host memory. When too many steps in a row are skipped, or spike, or the caller says so,
the newest copy that is finite throughout is loaded again, the learning rate is lowered, and the
caller is told where to go on and which data to leave out. After `max_attempts` without getting past
the trouble it gives up with the story.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastguard.errors import TrainingDivergedError
from fastguard.optimizer import GuardedOptimizer
from fastguard.records import StepRecord
from fastguard.schedule import GuardedLR
from fastguard.snapshot import Snapshot

log = logging.getLogger("fastguard")


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a rollback asks of the training loop.

    Attributes:
        step: The optimizer step whose state is in force again.
        position: Where the data stood then: what `Rollback.step` was given at that step.
        skip: The positions of the bad steps since then, in order: data to leave out.
        reason: What set it off.
        attempt: How many rollbacks this trouble has taken, from 1.
    """

    step: int
    position: Any
    skip: tuple[Any, ...]
    reason: str
    attempt: int


class Rollback:
    """Takes snapshots and goes back to them.

    Args:
        optimizer: The guarded optimizer; it is part of every snapshot.
        objects: Everything else that makes up the run, by name: model, scheduler, GradScaler, EMA,
            data loader; anything with `state_dict` and `load_state_dict`. Random number generators
            are always included.
        every: Applied steps without an incident between snapshots.
        keep: How many snapshots are kept.
        after_skips: Skipped steps in a row that set off a rollback; None: they do not.
        after_spikes: Steps in a row with a spike (recorded, clipped or skipped) that do; None: not.
        lr: The schedule to lower at a rollback.
        lr_factor: What it is lowered by.
        max_attempts: Rollbacks without a snapshot beyond the trouble before giving up.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> rollback = fastguard.Rollback(opt, {"model": model}, every=1, after_skips=2)
        >>> before = model.weight.detach().clone()
        >>> for batch in range(2):
        ...     opt.step(loss=float("nan"))
        ...     rewind = rollback.step(position=batch)
        >>> rewind.skip, rewind.reason
        ((0, 1), '2 steps in a row were skipped')
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        objects: Mapping[str, Any],
        *,
        every: int = 100,
        keep: int = 2,
        after_skips: int | None = 5,
        after_spikes: int | None = None,
        lr: GuardedLR | None = None,
        lr_factor: float = 0.5,
        max_attempts: int = 3,
    ) -> None:
        if not isinstance(optimizer, GuardedOptimizer):
            raise TypeError(f"optimizer={optimizer!r} must be a fastguard.GuardedOptimizer")
        for name, thing in objects.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise TypeError(
                    f"objects[{name!r}] is a {type(thing).__name__} without state_dict and "
                    "load_state_dict; wrap it in an object that has both"
                )
        counts = {"every": every, "keep": keep, "max_attempts": max_attempts}
        optional = {"after_skips": after_skips, "after_spikes": after_spikes}
        for name, value in {
            **counts,
            **{k: v for k, v in optional.items() if v is not None},
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"lr_factor={lr_factor!r} must be a number in (0, 1]")
        self.optimizer = optimizer
        self.objects = {**objects, "optimizer": optimizer}
        if lr is not None:
            self.objects["lr"] = lr
        self.every, self.keep = every, keep
        self.after_skips, self.after_spikes = after_skips, after_spikes
        self.lr, self.lr_factor = lr, lr_factor
        self.max_attempts = max_attempts
        self.attempts = 0
        self._trouble_until = 0
        self._inbox = optimizer.subscribe()
        self._positions: deque[Any] = deque()
        self._since: list[tuple[StepRecord, Any]] = []  # bad steps since the oldest snapshot
        self._clean = self._skips = self._spikes = 0
        self._snapshots: deque[Snapshot] = deque()
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait_for_copy)
        self.snapshot()

    @property
    def snapshots(self) -> list[int]:
        """The steps of the snapshots at hand, oldest first."""
        return [s.step for s in self._snapshots if s.step is not None]

    def step(self, position: Any = None) -> Rewind | None:
        """To be called after every `optimizer.step`.

        Args:
            position: Where the data stands: whatever finds this batch again.

        Returns:
            None, or what to do after a rollback.

        Raises:
            TrainingDivergedError: `max_attempts` rollbacks did not get past the trouble, or no
                snapshot is finite.
        """
        self._positions.append(position)
        reason = None
        while self._inbox:
            record = self._inbox.popleft()
            reason = self._learn(record, self._positions.popleft()) or reason
        if reason is not None:
            return self.trigger(reason)
        if self._clean >= self.every:
            self.snapshot(position)
        return None

    def snapshot(self, position: Any = None) -> None:
        """Copies the state now; the oldest copy beyond `keep` is overwritten."""
        full = len(self._snapshots) >= self.keep
        slot = self._snapshots.popleft() if full else Snapshot()
        step = self.optimizer.steps_taken
        self._copied = slot.take(self.objects, step, position)
        self._snapshots.append(slot)
        self._clean = 0
        oldest = self._snapshots[0].step or 0
        self._since = [(r, p) for r, p in self._since if r.step > oldest]
        if step > self._trouble_until:
            self.attempts = 0

    def trigger(self, reason: str = "the caller asked for it") -> Rewind:
        """Goes back now.

        Raises:
            TrainingDivergedError: As in `step`.
        """
        self.optimizer.settle()
        while self._inbox and self._positions:
            self._learn(self._inbox.popleft(), self._positions.popleft())
        self.attempts += 1
        now = self.optimizer.steps_taken
        story = f"{reason}, at step {now}"
        if self.attempts > self.max_attempts:
            raise TrainingDivergedError(
                f"{story}; {self.max_attempts} rollbacks did not get past it. {self._story()}",
                self._since[-1][0].culprits if self._since else (),
            )
        slot = self._newest_finite(story)
        skip = tuple(p for r, p in self._since if r.step > (slot.step or 0))
        slot.restore(self.objects)
        if self.lr is not None and self.lr_factor < 1:
            self.lr.lower(self.lr_factor**self.attempts)
        self.optimizer.zero_grad()
        self._trouble_until = max(self._trouble_until, now)
        self._clean = self._skips = self._spikes = 0
        self._positions.clear()
        self._inbox.clear()
        rewind = Rewind(slot.step or 0, slot.position, skip, reason, self.attempts)
        log.warning("rolled back to step %d (attempt %d): %s", rewind.step, rewind.attempt, story)
        return rewind

    def _learn(self, record: StepRecord, position: Any) -> str | None:
        skipped = record.action == "skipped"
        self._skips = self._skips + 1 if skipped else 0
        self._spikes = self._spikes + 1 if record.spikes else 0
        if record.reason is None:
            self._clean += 1
            return None
        self._since.append((record, position))
        if self.after_skips is not None and self._skips >= self.after_skips:
            return f"{self._skips} steps in a row were skipped"
        if self.after_spikes is not None and self._spikes >= self.after_spikes:
            return f"{self._spikes} steps in a row spiked"
        return None

    def _newest_finite(self, story: str) -> Snapshot:
        refused = []
        while self._snapshots:
            slot = self._snapshots[-1]
            bad = slot.nonfinite()
            if not bad:
                return slot
            refused.append(f"step {slot.step}: {', '.join(bad[:8])}")
            self._snapshots.pop()
        raise TrainingDivergedError(
            f"{story}, and no snapshot is finite: {'; '.join(refused)}. Start again from an older "
            "checkpoint"
        )

    def _story(self) -> str:
        return " | ".join(str(record) for record, _ in self._since[-8:])

    def _wait_for_copy(self, *_: Any) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None
