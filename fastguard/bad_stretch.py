"""The steps since the last snapshots: which were bad, and when that calls for a rollback."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastguard.records import StepRecord


class Moment(NamedTuple):
    """When something happened. Moments compare as time does: a rollback lowers the step alone.

    Attributes:
        rollbacks: How many there had been.
        step: Number of the optimizer step.
    """

    rollbacks: int
    step: int


class BadStretch:
    """Counts clean steps, skips in a row and spikes in a row; remembers the bad steps.

    Args:
        after_skips: Skipped steps in a row that call for a rollback; None: they do not.
        after_spikes: Steps in a row with a spike that do; None: they do not.

    Attributes:
        clean: Steps without an incident since the last snapshot.
        rollbacks: How many there have been.
    """

    def __init__(self, after_skips: int | None, after_spikes: int | None) -> None:
        self.after_skips, self.after_spikes = after_skips, after_spikes
        self.clean = self.rollbacks = 0
        self._skips = self._spikes = 0
        self._bad: list[tuple[Moment, StepRecord, Any]] = []

    def learn(self, record: StepRecord, position: Any) -> str | None:
        """Takes in one step; the reason for a rollback, if it gives one."""
        self._skips = self._skips + 1 if record.action == "skipped" else 0
        self._spikes = self._spikes + 1 if record.spikes else 0
        if record.reason is None:
            self.clean += 1
            return None
        self._bad.append((Moment(self.rollbacks, record.step), record, position))
        if self.after_skips is not None and self._skips >= self.after_skips:
            return (
                "a step was skipped"
                if self._skips == 1
                else f"{self._skips} steps in a row were skipped"
            )
        if self.after_spikes is not None and self._spikes >= self.after_spikes:
            return "a step spiked" if self._spikes == 1 else f"{self._spikes} steps in a row spiked"
        return None

    def positions_since(self, moment: Moment) -> tuple[Any, ...]:
        """Where the data stood at the bad steps after that, in order."""
        return tuple(position for when, _, position in self._bad if when > moment)

    def forget_until(self, moment: Moment) -> None:
        """Nobody goes back further than that any more."""
        self._bad = [bad for bad in self._bad if bad[0] > moment]

    def start_anew(self) -> None:
        """After a rollback: the steps in a row begin again; the bad steps are remembered."""
        self.clean = self._skips = self._spikes = 0
        self.rollbacks += 1

    @property
    def culprits(self) -> tuple[Any, ...]:
        """Of the last bad step."""
        return self._bad[-1][1].culprits if self._bad else ()

    def __str__(self) -> str:
        """The last bad steps, for the error that ends a run."""
        return " | ".join(str(record) for _, record, _ in self._bad[-8:])
