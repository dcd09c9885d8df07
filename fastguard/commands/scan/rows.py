"""Rows of a log that is data, judged together: column by column it takes a tenth of the time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.values import Value

Column = tuple[Sequence[int], Sequence[float]]
"""The rows that have a value, in their order, and the values."""


class Rows(NamedTuple):
    """Rows that follow each other.

    Attributes:
        dialect: Who writes such rows.
        numbers: Their lines.
        place: Gives what the row at an index says of its place.
        text: Gives the row at an index as it stands in the log.
        columns: By name the finite values of each series that is judged.
        bad: By row the values that are NaN or Inf.
        measured: 1 for each row that shows that the run is finite again.
        mentions: The rows that have NaN or Inf, but not as a value.
        odd: The rows that must be read one by one.
    """

    dialect: str
    numbers: Sequence[int]
    place: Callable[[int], Place]
    text: Callable[[int], str]
    columns: dict[str, Column]
    bad: dict[int, list[Value]]
    measured: bytearray
    mentions: Sequence[int]
    odd: set[int]

    def parts(self) -> Iterator[tuple[int, int]]:
        """The stretches of rows between those that are odd, first and last + 1."""
        begin = 0
        for at in (*sorted(self.odd), len(self.numbers)):
            if begin < at:
                yield begin, at
            begin = at + 1

    def series(self, begin: int, end: int) -> Iterator[tuple[str, Sequence[int], Sequence[float]]]:
        """The values of some of the rows by name."""
        for name, (at, values) in self.columns.items():
            first, last = bisect_left(at, begin), bisect_left(at, end)
            if first < last:
                yield name, at[first:last], values[first:last]
