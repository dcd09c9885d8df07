"""The steps since the last snapshots: which were bad, and when that calls for a rollback."""

from __future__ import annotations

from typing import Any

from fastguard.records import StepRecord


class BadStretch:
    """Counts clean steps, skips in a row and spikes in a row; remembers the bad steps.

    Args:
        after_skips: Skipped steps in a row that call for a rollback; None: they do not.
        after_spikes: Steps in a row with a spike that do; None: they do not.

    Attributes:
        clean: Steps without an incident since the last snapshot.
    """

    def __init__(self, after_skips: int | None, after_spikes: int | None) -> None:
        self.after_skips, self.after_spikes = after_skips, after_spikes
        self.clean = 0
        self._skips = self._spikes = 0
        self._bad: list[tuple[StepRecord, Any]] = []

    def learn(self, record: StepRecord, position: Any) -> str | None:
        """Takes in one step; the reason for a rollback, if it gives one."""
        self._skips = self._skips + 1 if record.action == "skipped" else 0
        self._spikes = self._spikes + 1 if record.spikes else 0
        if record.reason is None:
            self.clean += 1
            return None
        self._bad.append((record, position))
        if self.after_skips is not None and self._skips >= self.after_skips:
            return (
                "a step was skipped"
                if self._skips == 1
                else f"{self._skips} steps in a row were skipped"
            )
        if self.after_spikes is not None and self._spikes >= self.after_spikes:
            return "a step spiked" if self._spikes == 1 else f"{self._spikes} steps in a row spiked"
        return None

    def positions_since(self, step: int) -> tuple[Any, ...]:
        """Where the data stood at the bad steps after `step`, in order."""
        return tuple(position for record, position in self._bad if record.step > step)

    def forget_until(self, step: int) -> None:
        """Nobody goes back further than to `step` any more."""
        self._bad = [(r, p) for r, p in self._bad if r.step > step]

    def start_anew(self) -> None:
        """The steps in a row begin again; the bad steps are remembered."""
        self.clean = self._skips = self._spikes = 0

    @property
    def culprits(self) -> tuple[Any, ...]:
        """Of the last bad step."""
        return self._bad[-1][0].culprits if self._bad else ()

    def __str__(self) -> str:
        """The last bad steps, for the error that ends a run."""
        return " | ".join(str(record) for record, _ in self._bad[-8:])
