"""The steps around an incident, one by one, however coarse the buckets of the run are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fastguard.commands.report.columns import Series

REACH = 16
"""Steps before the first step of an incident, and after it."""


@dataclass(frozen=True, slots=True)
class CloseUp:
    """Consecutive records: `step` int64 `(n,)` and float64 `(n,)` by series."""

    step: np.ndarray
    values: Mapping[Series, np.ndarray]


class CloseUps:
    """Cuts the neighbourhoods of incidents out of the blocks that pass by.

    An incident may lie near the end of a block: its close-up is cut when enough of the next has
    come, and the last records of each block are kept for that.

    Attributes:
        found: The close-ups by the record that they are about, counted from 0.
    """

    def __init__(self) -> None:
        self.found: dict[int, CloseUp] = {}
        self._tail = CloseUp(np.empty(0, np.int64), {})
        self._end = 0  # the record after the tail
        self._waiting: list[int] = []

    def add(
        self, step: np.ndarray, values: Mapping[Series, np.ndarray], about: Collection[int]
    ) -> None:
        """Takes the next records, and all that close-ups are wanted of; others are dropped."""
        here = _joined(self._tail, CloseUp(step, values))
        self._waiting += [record for record in about if record >= self._end]
        self._end += len(step)
        self._keep(set(about))
        self._cut(here, last=self._end - 1 - REACH)
        self._tail = _slice(here, max(0, len(here.step) - 2 * REACH), len(here.step))

    def finish(self, about: Collection[int]) -> None:
        """There are no more records: what still waits for them gets what there is."""
        self._keep(set(about))
        self._cut(self._tail, last=self._end)

    def _keep(self, wanted: set[int]) -> None:
        self.found = {record: cut for record, cut in self.found.items() if record in wanted}
        self._waiting = [record for record in self._waiting if record in wanted]

    def _cut(self, here: CloseUp, last: int) -> None:
        start = self._end - len(here.step)
        for record in self._waiting:
            if record <= last:
                row = record - start
                self.found[record] = _slice(here, max(0, row - REACH), row + REACH + 1)
        self._waiting = [record for record in self._waiting if record > last]


def _slice(records: CloseUp, start: int, stop: int) -> CloseUp:
    # Copies: a view would keep its whole block in memory.
    columns = {series: column[start:stop].copy() for series, column in records.values.items()}
    return CloseUp(records.step[start:stop].copy(), columns)


def _joined(a: CloseUp, b: CloseUp) -> CloseUp:
    """A series that only one of them has is NaN in the other."""
    values = {}
    for series in {**a.values, **b.values}:
        parts = [p.values.get(series, np.full(len(p.step), np.nan)) for p in (a, b)]
        values[series] = np.concatenate(parts)
    return CloseUp(np.concatenate([a.step, b.step]), values)
