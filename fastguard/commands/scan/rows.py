"""`Rows`: consecutive rows of a structured log, which are judged by column for speed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.values import Value

Column = tuple[Sequence[int], Sequence[float]]
"""The indices of the rows that have a value, in ascending order, and the values."""


class Rows(NamedTuple):
    """Consecutive rows.

    Attributes:
        dialect: Dialect of the rows.
        numbers: The line numbers of the rows.
        place: Returns the place that the row at an index names.
        epoch: Returns the epoch of the row at an index, faster than `place`.
        batches, steps: Whether a row may name a batch or a step.
        text: Returns the text of the row at an index.
        columns: Finite values of each judged series, by name.
        bad: NaN and Inf values, by row.
        measured: 1 for each row with finite measurements, which ends a stretch.
        mentions: Rows that contain NaN or Inf, but not as a value.
        odd: Indices of rows that must be read individually.
    """

    dialect: str
    numbers: Sequence[int]
    place: Callable[[int], Place]
    epoch: Callable[[int], float | None]
    batches: bool
    steps: bool
    text: Callable[[int], str]
    columns: dict[str, Column]
    bad: dict[int, list[Value]]
    measured: bytearray
    mentions: Sequence[int]
    odd: set[int]

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yields the ranges of rows between odd ones, as `(begin, end)`."""
        begin = 0
        for at in (*sorted(self.odd), len(self.numbers)):
            if begin < at:
                yield begin, at
            begin = at + 1

    def series(self, begin: int, end: int) -> Iterator[tuple[str, Sequence[int], Sequence[float]]]:
        """The values in a range of rows, by name."""
        for name, (at, values) in self.columns.items():
            first, last = bisect_left(at, begin), bisect_left(at, end)
            if first < last:
                yield name, at[first:last], values[first:last]
