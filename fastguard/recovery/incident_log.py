"""The steps since the last snapshots: which were bad, and when that calls for a rollback."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any, NamedTuple

from fastguard.records.step_record import StepRecord

log = logging.getLogger("fastguard")

POSITIONS = 1 << 16
"""Positions of bad steps that are remembered: 8 MB or so."""

STORY = 8
"""Bad steps that the error names which ends a run."""

PATIENCE = 10
"""Times `every` steps that no snapshot could follow, before the reason is logged."""


class Moment(NamedTuple):
    """When something happened. Moments compare as time does, though a rollback lowers the step.

    Attributes:
        line: How often the run had gone on from another state: rollbacks, and loads by the caller.
        step: Number of the optimizer step.
        rollbacks: How many there had been.
    """

    line: int
    step: int
    rollbacks: int = 0


class BadStretch:
    """Counts steps since a snapshot, skips in a row and spikes in a row; remembers the bad steps.

    Its memory is bounded, whatever the run does.

    Args:
        every: Applied steps between snapshots.
        after_skips: Skipped steps in a row that call for a rollback; None: they do not.
        after_spikes: Steps in a row with a spike that do; None: they do not.

    Attributes:
        rollbacks: How many there have been.
    """

    def __init__(self, every: int, after_skips: int | None, after_spikes: int | None) -> None:
        self.every = every
        self.after_skips, self.after_spikes = after_skips, after_spikes
        self.rollbacks = self._line = 0
        self._applied = self._barring = 0  # since the last snapshot
        self._waits: float = 1  # times `every` steps; inf behind a step that bars a snapshot
        self._skips = self._spikes = 0
        self._bad: deque[tuple[Moment, Any]] = deque(maxlen=POSITIONS)
        self._story: deque[tuple[Moment, StepRecord]] = deque(maxlen=STORY)
        self._said_lost = False

    def learn(self, record: StepRecord, position: Any) -> str | None:
        """Takes in one step; the reason for a rollback, if it gives one."""
        skipped = record.action == "skipped"
        if not record.is_incident:
            if not skipped:  # an overflow that only lowers a loss scale tells nothing
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
        """Whether a snapshot may be due when that many more steps have been learnt."""
        return self._applied + n_steps >= self.every

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is due; it waits up to `every` steps for one without an incident."""
        return self._applied >= self._waits * self.every

    def taken(self, oldest: Moment) -> None:
        """A snapshot was taken; the caller cannot go back further than to `oldest` any more."""
        while self._bad and self._bad[0][0] <= oldest:
            self._bad.popleft()
        while self._story and self._story[0][0] <= oldest:
            self._story.popleft()

    def begin_anew(self) -> None:
        """Counts the steps to the next snapshot from now."""
        self._applied = self._barring = 0

    def keep_next(self) -> None:
        """The next step that may be kept is."""
        self._applied = self.every

    def now(self, step: int) -> Moment:
        """The moment after an optimizer step."""
        return Moment(self._line, step, self.rollbacks)

    def positions_since(self, moment: Moment) -> tuple[Any, ...]:
        """Where the data stood at the bad steps after that, in order."""
        return tuple(position for when, position in self._bad if when > moment)

    def go_on_from_another_state(self) -> None:
        """A state was loaded: steps in a row begin again, and the next good step is kept."""
        self._line += 1
        self._skips = self._spikes = self._barring = 0
        self.keep_next()
        self._waits = 1

    def go_back(self) -> None:
        """After a rollback: the steps in a row begin again; the bad steps are remembered."""
        self.go_on_from_another_state()
        self.begin_anew()
        self.rollbacks += 1

    @property
    def culprits(self) -> tuple[Any, ...]:
        """The culprits of the last bad step."""
        return self._story[-1][1].culprits if self._story else ()

    def __str__(self) -> str:
        """The last bad steps, for the error that ends a run."""
        return " | ".join(str(record) for _, record in self._story)

    def _bars_a_snapshot(self, record: StepRecord) -> bool:
        """Whether the state after this bad step is not one to go back to.

        A step that was applied after cleaning is no bar, nor is a spike that nothing acts on. NaN
        that `nonfinite="propagate"` applied is.
        """
        if record.action == "skipped" or (record.spikes and self.after_spikes is not None):
            return True
        found = record.nan or record.posinf or record.neginf
        return bool(found) and record.action != "sanitized"

    def _remember(self, record: StepRecord, position: Any) -> None:
        if len(self._bad) == POSITIONS and not self._said_lost:
            self._said_lost = True
            log.warning(
                "Rollback: more than %d bad steps since the oldest snapshot; a rollback no longer "
                "says of the first ones which data to leave out",
                POSITIONS,
            )
        moment = self.now(record.step)
        self._bad.append((moment, position))
        self._story.append((moment, record))

    def _say_why_there_is_none(self, record: StepRecord) -> None:
        if self._barring == PATIENCE * self.every:
            log.warning(
                "Rollback: no snapshot since %d bad steps, of which none may be gone back to; "
                "every=%d needs that many others. Last: %s",
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
