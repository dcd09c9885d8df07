"""Tracks the bad steps since the last snapshots and decides when they call for a rollback."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any, NamedTuple

from fastguard.records.step_record import StepRecord

log: logging.Logger = logging.getLogger("fastguard")

POSITIONS = 1 << 16
"""Maximum number of remembered positions of bad steps: about 8 MB."""

STORY = 8
"""Number of bad steps listed in the error that ends a run."""

PATIENCE = 10
"""Multiple of `every` without a possible snapshot after which the reason is logged."""


class Moment(NamedTuple):
    """A point in time. Moments compare like time, although a rollback lowers the step.

    Attributes:
        line: Number of times the run continued from another state: rollbacks, and loads by the
            caller.
        step: Number of the optimizer step.
        rollbacks: Number of rollbacks so far.
    """

    line: int
    step: int
    rollbacks: int = 0


class BadStretch:
    """Counts steps since a snapshot, and skips and spikes in a row; remembers the bad steps.

    Its memory use is bounded.

    Args:
        every: Applied steps between snapshots.
        after_skips: Skipped steps in a row that call for a rollback; None: no limit.
        after_spikes: Steps with a spike in a row that call for a rollback; None: no limit.

    Attributes:
        rollbacks: Number of rollbacks so far.
    """

    def __init__(self, every: int, after_skips: int | None, after_spikes: int | None) -> None:
        self.every = every
        self.after_skips: int | None = after_skips
        self.after_spikes: int | None = after_spikes
        self.rollbacks: int = 0
        self._line = 0
        self._applied = self._barring = 0  # since the last snapshot
        self._waits: float = 1  # multiple of `every`; inf after a step that rules out a snapshot
        self._skips = self._spikes = 0
        self._bad: deque[tuple[Moment, Any]] = deque(maxlen=POSITIONS)
        self._story: deque[tuple[Moment, StepRecord]] = deque(maxlen=STORY)
        self._said_lost = False

    def learn(self, record: StepRecord, position: Any) -> str | None:
        """Processes one step; returns a reason for a rollback, or None."""
        skipped = record.action == "skipped"
        if not record.is_incident:
            if not skipped:  # an overflow that only lowers a loss scale is ignored
                self._skips = self._spikes = 0
                self._applied += 1
                self._waits = 1
            return None
        self._skips = self._skips + 1 if skipped else 0
        self._spikes = self._spikes + 1 if record.spikes else 0
        self._remember(record, position)
        if self._bars_a_snapshot(record):
            self._barring += 1
            self._waits = math.inf
            self._say_why_there_is_none(record)
        else:
            self._applied += 1
            self._waits = 2
        return self._reason()

    def is_due_after(self, n_steps: int) -> bool:
        """Whether a snapshot may be due after that many more steps."""
        return self._applied + n_steps >= self.every

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is due; waits up to `every` steps for a step without an incident."""
        return self._applied >= self._waits * self.every

    def taken(self, oldest: Moment) -> None:
        """Records that a snapshot was taken; the caller can no longer go back beyond `oldest`."""
        while self._bad and self._bad[0][0] <= oldest:
            self._bad.popleft()
        while self._story and self._story[0][0] <= oldest:
            self._story.popleft()

    def begin_anew(self) -> None:
        """Restarts the count of steps to the next snapshot."""
        self._applied = self._barring = 0

    def keep_next(self) -> None:
        """Takes a snapshot at the next step that allows one."""
        self._applied = self.every

    def now(self, step: int) -> Moment:
        """Returns the moment after an optimizer step."""
        return Moment(self._line, step, self.rollbacks)

    def positions_since(self, moment: Moment) -> tuple[Any, ...]:
        """Returns the data positions of the bad steps after that moment, in order."""
        return tuple(position for when, position in self._bad if when > moment)

    def go_on_from_another_state(self) -> None:
        """Records that a state was loaded: resets the counts in a row, and keeps the next good
        step."""
        self._line += 1
        self._skips = self._spikes = self._barring = 0
        self.keep_next()
        self._waits = 1

    def go_back(self) -> None:
        """Records a rollback: resets the counts in a row, and still remembers the bad steps."""
        self.go_on_from_another_state()
        self.begin_anew()
        self.rollbacks += 1

    @property
    def culprits(self) -> tuple[Any, ...]:
        """Returns the culprits of the last bad step."""
        return self._story[-1][1].culprits if self._story else ()

    def __str__(self) -> str:
        """Describes the last bad steps, for the error that ends a run."""
        return " | ".join(str(record) for _, record in self._story)

    def _bars_a_snapshot(self, record: StepRecord) -> bool:
        """Whether the state after this bad step is unsuitable for a snapshot.

        A step applied after cleaning is suitable, as is a spike that no rule acts on. A step that
        applied NaN under `nonfinite="propagate"` is not.
        """
        if record.action == "skipped" or (record.spikes and self.after_spikes is not None):
            return True
        found = record.nan or record.posinf or record.neginf
        return bool(found) and record.action != "sanitized"

    def _remember(self, record: StepRecord, position: Any) -> None:
        if len(self._bad) == POSITIONS and not self._said_lost:
            self._said_lost = True
            log.warning(
                "Rollback: more than %d bad steps since the oldest snapshot; a rollback will no "
                "longer "
                "list the data of the first ones to leave out",
                POSITIONS,
            )
        moment = self.now(record.step)
        self._bad.append((moment, position))
        self._story.append((moment, record))

    def _say_why_there_is_none(self, record: StepRecord) -> None:
        if self._barring == PATIENCE * self.every:
            log.warning(
                "Rollback: no snapshot since %d bad steps, none of which is suitable for one; "
                "every=%d requires that many good steps. Last: %s",
                self._barring,
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
            return "a step spiked" if self._spikes == 1 else f"{self._spikes} steps in a row spiked"
        return None
