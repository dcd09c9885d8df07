"""A run of any length in a fixed number of buckets.

A bucket is the steps whose number agrees in all but the last `shift` bits, so its width is a power
of two and its place does not depend on where a run began. When there are more buckets than allowed,
`shift` grows by one and neighbours are joined: nothing is read twice, and minimum, maximum, count
and sum of a joined bucket are exactly those of its steps. Steps may come in any order, as they do
after a rollback.

Memory: 6 float64 numbers a series and bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fastguard.commands.report.columns import Series


@dataclass(frozen=True, slots=True)
class Curve:
    """One series, downsampled; all arrays are float64 with one entry a bucket that has a value.

    Attributes:
        low, high: The least and the greatest value of a bucket.
        low_at, high_at: The steps of these two.
        mean: The mean over the good steps, NaN where there were none.
        middle: The step in the middle of a bucket.
    """

    low: np.ndarray
    low_at: np.ndarray
    high: np.ndarray
    high_at: np.ndarray
    mean: np.ndarray
    middle: np.ndarray


_LOW, _LOW_AT, _HIGH, _HIGH_AT, _SUM, _COUNT = range(6)


class Buckets:
    """The extremes and the mean of every series in every bucket.

    Args:
        limit: How many buckets there may be, >= 2.

    Attributes:
        shift: A bucket is `2**shift` steps wide.
        keys: int64 `(buckets,)`: `step >> shift` of each bucket, ascending.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shift = 0
        self.keys = np.empty(0, np.int64)
        self._series: dict[Series, int] = {}
        self._cells = np.empty((0, 6, 0))

    def add(self, step: np.ndarray, values: Mapping[Series, np.ndarray], good: np.ndarray) -> None:
        """Takes some steps.

        Args:
            step: int64 `(n,)`.
            values: float64 `(n,)` by series; what is not finite is left out.
            good: bool `(n,)`: the steps that count for the mean.
        """
        if not len(step):
            return
        for series in values:
            self._series.setdefault(series, len(self._series))
        rows = np.full((len(self._series), len(step)), np.nan)
        for series, column in values.items():
            rows[self._series[series]] = column
        old = self._cells
        missing = len(self._series) - len(old)
        old = np.concatenate([old, _nothing(missing, old.shape[2])])
        cells = np.concatenate([old, _cells_of(step, rows, good)], axis=2)
        keys = np.concatenate([self.keys, step >> self.shift])
        while len(np.unique(keys)) > self.limit:
            keys >>= 1
            self.shift += 1
        self.keys, self._cells = _join(keys, cells)

    @property
    def series(self) -> list[Series]:
        """All that was added, in the order in which it came."""
        return list(self._series)

    def curve(self, series: Series) -> Curve | None:
        """A series, or None if it never had a finite value."""
        if series not in self._series:
            return None
        cells = self._cells[self._series[series]]
        there = np.isfinite(cells[_LOW])
        if not there.any():
            return None
        cells = cells[:, there]
        count = cells[_COUNT]
        mean = np.divide(cells[_SUM], count, out=np.full(len(count), np.nan), where=count > 0)
        middle = (self.keys[there] << self.shift) + (2**self.shift - 1) / 2
        return Curve(
            cells[_LOW], cells[_LOW_AT], cells[_HIGH], cells[_HIGH_AT], mean, middle.astype(float)
        )


class Tally:
    """How often something by name happened in each bucket, and where it first did.

    Args:
        limit: How many buckets a name may have.
        names: How many names there may be; the rest is counted under `OTHERS`.
    """

    OTHERS = "all others"

    def __init__(self, limit: int, names: int = 64) -> None:
        self.limit = limit
        self.shift = 0
        self._names = names
        self._counts: dict[str, dict[int, tuple[int, int]]] = {}

    def add(self, name: str, step: int) -> None:
        """Counts one at a step."""
        if name not in self._counts and len(self._counts) >= self._names:
            name = self.OTHERS
        counts = self._counts.setdefault(name, {})
        count, first = counts.get(step >> self.shift, (0, step))
        counts[step >> self.shift] = (count + 1, min(first, step))
        while len(counts) > self.limit:
            self._halve()
            counts = self._counts[name]

    @property
    def names(self) -> list[str]:
        """In the order in which they were first counted."""
        return list(self._counts)

    def total(self, name: str) -> int:
        """How often it happened in the whole run."""
        return sum(count for count, _ in self._counts[name].values())

    def items(self, name: str) -> Iterator[tuple[int, int, int]]:
        """`(bucket, count, first step)` of each bucket in which it happened, in order."""
        for key in sorted(self._counts[name]):
            yield key, *self._counts[name][key]

    def _halve(self) -> None:
        self.shift += 1
        for name, counts in self._counts.items():
            joined: dict[int, tuple[int, int]] = {}
            for key, (count, first) in counts.items():
                before, earliest = joined.get(key >> 1, (0, first))
                joined[key >> 1] = (before + count, min(earliest, first))
            self._counts[name] = joined


def _cells_of(step: np.ndarray, rows: np.ndarray, good: np.ndarray) -> np.ndarray:
    """One cell a step: float64 `(series, 6, n)`."""
    finite = np.isfinite(rows)
    counted = finite & good
    cells = np.empty((len(rows), 6, len(step)))
    cells[:, _LOW] = np.where(finite, rows, np.inf)
    cells[:, _HIGH] = np.where(finite, rows, -np.inf)
    cells[:, _LOW_AT] = cells[:, _HIGH_AT] = step
    cells[:, _SUM] = np.where(counted, rows, 0.0)
    cells[:, _COUNT] = counted
    return cells


def _nothing(series: int, buckets: int) -> np.ndarray:
    cells = np.zeros((series, 6, buckets))
    cells[:, _LOW], cells[:, _HIGH] = np.inf, -np.inf
    return cells


def _join(keys: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cells of equal keys as one, ascending."""
    if np.any(np.diff(keys) < 0):
        order = np.argsort(keys, kind="stable")
        keys, cells = keys[order], cells[:, :, order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    joined = np.empty((len(cells), 6, len(starts)))
    joined[:, _LOW], low = _extreme(np.minimum, cells[:, _LOW], starts)
    joined[:, _HIGH], high = _extreme(np.maximum, cells[:, _HIGH], starts)
    joined[:, _LOW_AT] = np.take_along_axis(cells[:, _LOW_AT], low, axis=1)
    joined[:, _HIGH_AT] = np.take_along_axis(cells[:, _HIGH_AT], high, axis=1)
    with np.errstate(over="ignore"):  # a mean beyond float64 is none, and is not drawn
        joined[:, _SUM] = np.add.reduceat(cells[:, _SUM], starts, axis=1)
    joined[:, _COUNT] = np.add.reduceat(cells[:, _COUNT], starts, axis=1)
    return keys[starts], joined


def _extreme(
    ufunc: np.ufunc, values: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extreme of each stretch that begins at `starts`, and where it is first found."""
    extreme = ufunc.reduceat(values, starts, axis=1)
    n = values.shape[1]
    lengths = np.diff(starts, append=n)
    hit = values == np.repeat(extreme, lengths, axis=1)
    place = np.minimum.reduceat(np.where(hit, np.arange(n), n), starts, axis=1)
    return extreme, place
