"""Tracks bad steps since the kept snapshots; decides when to take snapshots and roll back."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

from fastguard.errors.logger import log
from fastguard.records.step_record import StepRecord

POSITIONS = 1 << 16
"""Maximum number of bad steps whose data positions are kept: about 8 MB."""

STORY = 8
"""Number of bad steps listed in the error that ends a run."""

PATIENCE = 10
"""After `PATIENCE * every` unsuitable steps without a snapshot, a warning is logged."""


class Moment(NamedTuple):
    """A point in time. Later moments compare greater, although a rollback lowers the step.

    Attributes:
        restarts: Number of times that another state was loaded, by a rollback or by the caller.
        step: Number of the optimizer step.
        rollbacks: Number of rollbacks so far.
    """

    restarts: int
    step: int
    rollbacks: int = 0


class IncidentLog:
    """Counts steps since the last snapshot, and skips and spikes in a row; lists the bad steps.

    Its memory is bounded.

    Args:
        every: Applied steps between snapshots.
        after_skips: Number of skipped steps in a row that triggers a rollback; None: no limit.
        after_spikes: Number of steps with a spike in a row that triggers a rollback; None: no
            limit.

    Attributes:
        rollbacks: Number of rollbacks so far.
    """

    def __init__(self, every: int, after_skips: int | None, after_spikes: int | None) -> None:
        self.every = every
        self.after_skips: int | None = after_skips
        self.after_spikes: int | None = after_spikes
        self.rollbacks: int = 0
        self._restarts = 0
        self._applied = self._unsuitable = 0  # steps since the last snapshot
        # A snapshot is due after `_waits * every` applied steps. The factor is inf after an
        # unsuitable step.
        self._waits: float = 1
        self._skips = self._spikes = 0
        self._bad: deque[tuple[Moment, Any]] = deque(maxlen=POSITIONS)
        self._story: deque[tuple[Moment, StepRecord]] = deque(maxlen=STORY)
        self._has_warned_of_lost = False

    def learn(self, record: StepRecord, position: Any) -> str | None:
        """Processes one step; returns a reason for a rollback, or None."""
        skipped = record.action == "skipped"
        if not record.is_incident:
            if not skipped:  # skips that only lower a loss scale are ignored
                self._skips = self._spikes = 0
                self._applied += 1
                self._waits = 1
            return None
        self._skips = self._skips + 1 if skipped else 0
        self._spikes = self._spikes + 1 if record.spikes else 0
        self._remember(record, position)
        if self._is_unsuitable(record):
            self._unsuitable += 1
            self._waits = math.inf
            self._warn_if_none_is_possible(record)
        else:
            self._applied += 1
            self._waits = 2
        return self._reason()

    def is_due_after(self, n_steps: int) -> bool:
        """Whether a snapshot may be due after `n_steps` more steps."""
        return self._applied + n_steps >= self.every

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is due.

        If the last step was an incident, a snapshot is due `every` applied steps later than usual,
        to wait for a step without an incident.
        """
        return self._applied >= self._waits * self.every

    def forget_until(self, oldest: Moment) -> None:
        """Forgets the bad steps up to the oldest snapshot, since no rollback goes back further."""
        while self._bad and self._bad[0][0] <= oldest:
            self._bad.popleft()
        while self._story and self._story[0][0] <= oldest:
            self._story.popleft()

    def restart_count(self) -> None:
        """Restarts the count of steps to the next snapshot."""
        self._applied = self._unsuitable = 0

    def make_due(self) -> None:
        """Makes a snapshot due at the next suitable step."""
        self._applied = self.every

    def now(self, step: int) -> Moment:
        """Returns the moment after an optimizer step."""
        return Moment(self._restarts, step, self.rollbacks)

    def positions_since(self, moment: Moment) -> tuple[Any, ...]:
        """Returns the data positions of the bad steps after that moment, in order."""
        return tuple(position for when, position in self._bad if when > moment)

    def state_was_loaded(self) -> None:
        """Resets the counts after another state was loaded, and makes the next good step due."""
        self._restarts += 1
        self._skips = self._spikes = self._unsuitable = 0
        self.make_due()
        self._waits = 1

    def rolled_back(self) -> None:
        """Resets the counts after a rollback, but keeps the list of bad steps."""
        self.state_was_loaded()
        self.restart_count()
        self.rollbacks += 1

    @property
    def culprits(self) -> tuple[Any, ...]:
        """The culprits of the last bad step; empty if there is none."""
        return self._story[-1][1].culprits if self._story else ()

    def __str__(self) -> str:
        """Describes the last bad steps, for the error that ends a run."""
        return " | ".join(str(record) for _, record in self._story)

    def _is_unsuitable(self, record: StepRecord) -> bool:
        """Whether the state after this bad step is unsuitable for a snapshot.

        Steps that were applied after cleaning are suitable, and so are spikes if spikes never
        trigger a rollback. Skipped steps, other spikes, and steps that applied NaN under
        `nonfinite="propagate"` are unsuitable.
        """
        if record.action == "skipped" or (record.spikes and self.after_spikes is not None):
            return True
        found = record.nan or record.posinf or record.neginf
        return bool(found) and record.action != "sanitized"

    def _remember(self, record: StepRecord, position: Any) -> None:
        if len(self._bad) == POSITIONS and not self._has_warned_of_lost:
            self._has_warned_of_lost = True
            log.warning(
                "Rollback: there were more than %d bad steps since the oldest snapshot; after a "
                "rollback to that snapshot, Rewind.skip will lack the first of these steps",
                POSITIONS,
            )
        moment = self.now(record.step)
        self._bad.append((moment, position))
        self._story.append((moment, record))

    def _warn_if_none_is_possible(self, record: StepRecord) -> None:
        if self._unsuitable == PATIENCE * self.every:
            log.warning(
                "Rollback: no snapshot was possible for a long time: %d steps were bad since the "
                "last snapshot, and every=%d requires that many applied steps. Last bad step: %s",
                self._unsuitable,
                self.every,
                record,
            )

    def _reason(self) -> str | None:
        if self.after_skips is not None and self._skips >= self.after_skips:
            return (
                "a step was skipped"
                if self._skips == 1
                else f"{self._skips} steps in a row were skipped"
            )
        if self.after_spikes is not None and self._spikes >= self.after_spikes:
            return (
                "a step spiked"
                if self._spikes == 1
                else f"{self._spikes} steps in a row had a spike"
            )
        return None
