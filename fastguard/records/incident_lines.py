"""The log lines of incidents, repeats held back: `IncidentLines`.

The first `BURST` incidents of a kind (same action, same reason) have a line each; after them one
line every `INTERVAL` seconds, and the others are counted: "... and 17 more". The count comes before
the next line of that kind, else at the first good step after the interval, else at the end of the
run. Records and sinks hold every incident.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from fastguard.errors.last_resort import PREFIX
from fastguard.records.step_record import StepRecord

log: logging.Logger = logging.getLogger("fastguard")

BURST = 3
"""Lines of one kind that may come at once."""

INTERVAL = 10.0
"""Seconds from one line of a kind to the next after them."""

WIDTH = 120
"""Characters of a line, prefix included."""


@dataclass(slots=True)
class _Kind:
    """Incidents with the same action and reason.

    Attributes:
        allowed: Lines that may come now, `BURST` at most; a fraction grows with time.
        at: When `allowed` was computed, and when the last line came.
        held: Incidents without a line since then.
        first, last: Steps of the first and the last of them.
    """

    level: int
    what: str
    allowed: float
    at: float
    held: int = 0
    first: int = 0
    last: int = 0

    def say_held(self) -> None:
        """Logs how many were held back, if any were."""
        if not self.held:
            return
        steps = f"step {self.first}" if self.held == 1 else f"steps {self.first} to {self.last}"
        log.log(self.level, "... and %d more %s (%s)", self.held, self.what, steps)
        self.held = 0


class IncidentLines:
    """Logs the incidents of one run.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[tuple[str, str | None], _Kind] = {}
        self._holds = False
        self._at_end = weakref.finalize(self, _say_all_held, self._kinds)

    def see(self, record: StepRecord) -> None:
        """Takes in the next record of the run."""
        if record.reason is None:
            if self._holds:
                self._after_good_step()
            return
        now = self._clock()
        key = record.action, record.reason
        kind = self._kinds.get(key)
        if kind is None:
            level = logging.WARNING if record.is_incident else logging.INFO
            what = f"{record.action} {record.because}"
            kind = self._kinds[key] = _Kind(level, what, float(BURST), now)
        kind.allowed = min(float(BURST), kind.allowed + (now - kind.at) / INTERVAL)
        kind.at = now
        if kind.allowed >= 1.0:
            kind.say_held()
            kind.allowed -= 1.0
            log.log(kind.level, "%s", record.line(WIDTH - len(PREFIX)))
            return
        kind.first = kind.first if kind.held else record.step
        kind.held, kind.last, self._holds = kind.held + 1, record.step, True

    def flush(self) -> None:
        """Logs how many incidents were held back."""
        _say_all_held(self._kinds)
        self._holds = False

    def _after_good_step(self) -> None:
        now = self._clock()
        waiting = [kind for kind in self._kinds.values() if kind.held]
        for kind in waiting:
            if now - kind.at >= INTERVAL:
                kind.say_held()
        self._holds = any(kind.held for kind in waiting)


def _say_all_held(kinds: dict[tuple[str, str | None], _Kind]) -> None:
    for kind in kinds.values():
        kind.say_held()
