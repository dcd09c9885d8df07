"""Detects whether a series is rising at the end of a run, and since when.

    y(x) = level                        before the hinge
    y(x) = level + slope * (x - hinge)  after it

The curve is averaged into at most 128 bins, on a logarithmic scale if all values are positive. Only
the part after the lowest point (of a running median of five) is used. The function above is fitted
to it by least squares, with every bin tried as the hinge. The series counts as rising if the fit
explains at least half of the variance (so the rise is at least three standard deviations of the
residual), the rise reaches `factor` times the level, and the last quarter still rises. Noise, a
plateau after warm-up and a single spike do not meet these conditions.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

BINS = 128
_MIN_BINS = 8  # minimum number of bins in the rise, and after the lowest point
_EXPLAINED = 0.5
_STILL_RISING = 0.1  # share of the rise that the last quarter must add; a straight line adds 0.25


@dataclass(frozen=True, slots=True)
class Rise:
    """A series that rises until the end.

    Attributes:
        since: The step at which the rise began.
        before: Level before the rise.
        now: Level at the end.
    """

    since: int
    before: float
    now: float


def find_rise(step: np.ndarray, value: np.ndarray, *, factor: float = 1.5) -> Rise | None:
    """Finds a rise that lasts until the end of the series.

    Args:
        step: `(n,)`, ascending.
        value: `(n,)`; non-finite values are left out.
        factor: Minimum ratio of the final level to the level before, > 1.

    Returns:
        The rise, or None.
    """
    finite = np.isfinite(value)
    x, y = step[finite], value[finite]
    if len(y) < 2 * _MIN_BINS:
        return None
    logarithmic = bool(np.all(y > 0))
    # scales the values, since the square of the largest float would overflow
    scale = float(np.abs(y).max())
    x, y = _binned(x, np.log(y) if logarithmic else y / (scale or 1.0))
    lowest = int(np.argmin(_running_median(y)))
    x, y = x[lowest:], y[lowest:]
    if len(y) < _MIN_BINS:
        return None
    hinge, level, slope, unexplained = _fit(x, y)
    after = y[hinge:]
    rise = slope * (x[-1] - x[hinge])
    least = math.log(factor) if logarithmic else (factor - 1) * abs(level)
    last, before_last = after[3 * len(after) // 4 :], after[len(after) // 2 : 3 * len(after) // 4]
    if (
        len(after) < _MIN_BINS
        or rise < least
        or unexplained > (1 - _EXPLAINED) * float(np.sum((y - y.mean()) ** 2))
        or last.mean() - before_last.mean() < _STILL_RISING * rise
    ):
        return None
    before, now = level, level + rise
    if logarithmic:
        most = math.log(sys.float_info.max)
        before, now = math.exp(min(before, most)), math.exp(min(now, most))
    else:
        before, now = scale * before, scale * now
    bin_width = (x[-1] - x[0]) / (len(x) - 1)
    # the step is rounded to the precision of a bin
    digits = -max(0, math.floor(math.log10(bin_width)))
    return Rise(int(round(float(x[hinge]), digits)), before, now)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(0, len(x), min(BINS, len(x)) + 1).astype(int)[:-1]
    counts = np.diff(edges, append=len(x))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _running_median(y: np.ndarray) -> np.ndarray:
    padded = np.pad(y, 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[int, float, float, float]:
    """`(hinge, level, slope, sum of squared residuals)` of the best hinge."""
    best = (0, float(y.mean()), 0.0, math.inf)
    for hinge in range(len(x) - 1):
        ramp = np.maximum(0.0, x - x[hinge])
        centered = ramp - ramp.mean()
        slope = float(centered @ y / (centered @ centered))
        level = float(y.mean() - slope * ramp.mean())
        residual = float(np.sum((y - level - slope * ramp) ** 2))
        if residual < best[3]:
            best = (hinge, level, slope, residual)
    return best
