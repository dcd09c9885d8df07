"""Downsamples a series to the number of points that a screen can show.

A bucket holds the steps that agree in all but the last `shift` bits. So its width is a power of
two, and its position does not depend on the first step of the run. The minimum, maximum and mean of
a bucket are exact. Steps may come in any order, as they do after a rollback.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Curve:
    """One downsampled series: float64 arrays with one entry per bucket that has a value, and the
    points to draw.

    Attributes:
        low, high: Minimum and maximum of each bucket.
        high_at: Step of the maximum.
        mean: Mean over the good steps; NaN if there are none.
        middle: Step in the middle of each bucket.
        x, y: Steps and values of the extremes and of every step near an incident, in order. NaN
            marks a bad step without a finite value, so that the line has a gap there.
    """

    low: np.ndarray
    high: np.ndarray
    high_at: np.ndarray
    mean: np.ndarray
    middle: np.ndarray
    x: np.ndarray
    y: np.ndarray


def shift_for(step: np.ndarray, limit: int) -> int:
    """The smallest `shift` for which these steps fall into at most `limit` buckets."""
    keys, shift = np.sort(step), 0
    while len(keys := keys[_starts(keys)]) > limit:
        keys >>= 1
        shift += 1
    return shift


def _starts(keys: np.ndarray) -> np.ndarray:
    """Start of each stretch of equal keys; np.unique uses hashes and takes ten times as long."""
    return np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))


def downsample(
    step: np.ndarray, value: np.ndarray, *, shift: int, good: np.ndarray, near: np.ndarray
) -> Curve | None:
    """Downsamples a series into buckets of `2**shift` steps; None if it has no finite value.

    Args:
        step: int64 `(n,)`.
        value: float64 `(n,)`; non-finite values are left out, or leave a gap at a bad step.
        shift: See `shift_for`.
        good: bool `(n,)`: the steps included in the mean.
        near: bool `(n,)`: the steps drawn individually.
    """
    there = np.flatnonzero(np.isfinite(value))
    if not len(there):
        return None
    gaps = _gaps(step, step[there], ~(good | np.isfinite(value)), near, shift)
    if np.any(np.diff(step[there]) < 0):
        there = there[np.argsort(step[there], kind="stable")]
    step, value, good, near = step[there], value[there], good[there], near[there]
    keys = step >> shift
    starts = _starts(keys)
    low, low_row = _extreme(np.minimum, value, starts)
    high, high_row = _extreme(np.maximum, value, starts)
    count = np.add.reduceat(good, starts, dtype=float)
    with np.errstate(over="ignore"):  # a mean that overflows float64 is not drawn
        total = np.add.reduceat(np.where(good, value, 0.0), starts)
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    middle = (keys[starts] << shift) + (2**shift - 1) / 2
    rows = np.concatenate([low_row, high_row, np.flatnonzero(near)])
    drawn = np.unique(np.stack([step[rows], value[rows]], axis=1), axis=0)
    at = np.searchsorted(drawn[:, 0], gaps)
    x, y = np.insert(drawn[:, 0], at, gaps), np.insert(drawn[:, 1], at, np.nan)
    return Curve(low, high, step[high_row], mean, middle, x, y)


def _gaps(
    step: np.ndarray, finite: np.ndarray, bad: np.ndarray, near: np.ndarray, shift: int
) -> np.ndarray:
    """The steps at which a line is broken: individually drawn bad steps without a value, and one
    step per bucket without any value.

    Args:
        step: int64 `(n,)`.
        finite: int64 `(m,)`: steps with a value; a step that was repeated successfully is no gap.
        bad: bool `(n,)`: bad steps without a value.
        near: bool `(n,)`: steps drawn individually.
        shift: See `shift_for`.
    """
    single = np.setdiff1d(step[bad & (near | (shift == 0))], finite)
    empty = np.setdiff1d(step[bad] >> shift, finite >> shift)
    return np.union1d(single, (empty << shift) + (1 << shift >> 1))


def _extreme(
    ufunc: np.ufunc, values: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extreme of each stretch that begins at `starts`, and the first row that has it."""
    n = len(values)
    extreme = ufunc.reduceat(values, starts)
    hit = values == np.repeat(extreme, np.diff(starts, append=n))
    return extreme, np.minimum.reduceat(np.where(hit, np.arange(n), n), starts)
