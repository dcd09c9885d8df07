"""`IncidentLines`: logs incidents, with a limit on the rate of similar lines.

The first `BURST` incidents of a kind (same action and reason) are logged, then one incident per
`INTERVAL` seconds; all others are only counted. The count ("... and 17 more") is logged before the
next line of that kind, at the first good step after the interval, or at the end of the run,
whichever comes first. Records and sinks receive every incident.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from fastguard.errors.logger import PREFIX, log
from fastguard.records.step_record import StepRecord

BURST = 3
"""Number of incidents of one kind that are logged without delay."""

INTERVAL = 10.0
"""Seconds between later lines of the same kind."""

WIDTH = 120
"""Maximum characters of a line, including the prefix."""


@dataclass(slots=True)
class _Kind:
    """Incidents with the same action and reason.

    Attributes:
        level: Logging level.
        what: Action and reason in words.
        allowed: Number of lines that may be logged now, up to `BURST`; grows with time.
        at: Time of the last incident, when `allowed` was computed.
        held: Number of incidents that were not logged since the last line.
        first, last: Steps of the first and the last of the incidents in `held`.
    """

    level: int
    what: str
    allowed: float
    at: float
    held: int = 0
    first: int = 0
    last: int = 0

    def log_held(self) -> None:
        """Logs the number of incidents that were held back, if any."""
        if not self.held:
            return
        steps = f"step {self.first}" if self.held == 1 else f"steps {self.first} to {self.last}"
        log.log(self.level, "... and %d more %s (%s)", self.held, self.what, steps)
        self.held = 0


class IncidentLines:
    """Logs the incidents of one run.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[tuple[str, str | None], _Kind] = {}
        self._holds = False
        self._at_end = weakref.finalize(self, _log_all_held, self._kinds)

    def add(self, record: StepRecord) -> None:
        """Logs the next record of the run if it is an incident, or counts it."""
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
            kind.log_held()
            kind.allowed -= 1.0
            log.log(kind.level, "%s", record.line(WIDTH - len(PREFIX)))
            return
        kind.first = kind.first if kind.held else record.step
        kind.held, kind.last, self._holds = kind.held + 1, record.step, True

    def flush(self) -> None:
        """Logs the number of incidents that were held back."""
        _log_all_held(self._kinds)
        self._holds = False

    def _after_good_step(self) -> None:
        now = self._clock()
        waiting = [kind for kind in self._kinds.values() if kind.held]
        for kind in waiting:
            if now - kind.at >= INTERVAL:
                kind.log_held()
        self._holds = any(kind.held for kind in waiting)


def _log_all_held(kinds: dict[tuple[str, str | None], _Kind]) -> None:
    for kind in kinds.values():
        kind.log_held()
