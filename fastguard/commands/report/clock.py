"""`Clock`: the time of each step of a run, for the time axis.

A step that was repeated after a rollback has the time of its last repetition. Times never decrease
with the step number. Where the recorded times decrease, because a clock was set back or a run ended
below its highest step, the larger time is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_LATEST = 1e11  # Unix seconds, in the year 5138; larger numbers are not times


@dataclass(frozen=True, slots=True)
class Clock:
    """The times of some steps; the steps between them are interpolated.

    Attributes:
        start: Unix seconds of the first of these steps.
        steps: Step numbers, increasing.
        seconds: Seconds since `start`, never decreasing.
    """

    start: float
    steps: np.ndarray
    seconds: np.ndarray

    @property
    def end(self) -> float:
        """Unix seconds of the last step."""
        return self.start + float(self.seconds[-1])

    def as_dict(self) -> dict[str, Any]:
        """Returns the attributes as JSON values, with milliseconds."""
        return {
            "start": self.start,
            "steps": self.steps.tolist(),
            "seconds": np.round(self.seconds, 3).tolist(),
        }


def clock_of(step: np.ndarray, time: np.ndarray, *, shift: int, near: np.ndarray) -> Clock | None:
    """Returns the clock of a run; None if fewer than two steps have a time.

    Args:
        step: int64 `(n,)`.
        time: float64 `(n,)`, Unix seconds; invalid times are left out.
        shift: Keeps the first and the last step of every `2**shift` steps.
        near: bool `(n,)`: steps to keep in any case.
    """
    there = np.flatnonzero((time > 0) & (time < _LATEST))
    step, time, near = step[there], time[there], near[there]
    order = np.argsort(step, kind="stable")
    step, time, near = step[order], time[order], near[order]
    last_taken = np.append(np.diff(step) > 0, True)[: len(step)]
    step, time, near = step[last_taken], np.maximum.accumulate(time[last_taken]), near[last_taken]
    if len(step) < 2:
        return None
    keys = step >> shift
    changes = np.diff(keys) > 0
    kept = near | np.append(True, changes) | np.append(changes, True)
    return Clock(float(time[0]), step[kept], time[kept] - time[0])
