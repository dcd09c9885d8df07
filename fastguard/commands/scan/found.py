"""What a scan has found: stretches of bad lines, and all of a log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastguard.commands.scan.lines import Line
from fastguard.commands.scan.reading import Place, Where
from fastguard.commands.scan.series import Growth, Series
from fastguard.commands.scan.shapes import Shape
from fastguard.commands.scan.values import Value

NAMES = 64
"""Names of values that are told; the others are counted together, under `OTHER_NAMES`."""

OTHER_NAMES = "(others)"


@dataclass(slots=True)
class Stretch:
    """Bad lines that follow each other in one epoch.

    Attributes:
        dialect: Who wrote the first of them.
        first_line, last_line: Their line numbers.
        first, last: Where in the run.
        n_lines: How many there are; what a progress bar draws over itself counts each time.
        values: In how many of them each value was bad, by `Value`.
        excerpt: The first of them.
        steps: The steps of the first of them, in logs that are data.
    """

    dialect: str
    first_line: int
    last_line: int
    first: Place
    last: Place
    n_lines: int
    values: Counter[Value]
    excerpt: str
    steps: list[int] = field(default_factory=list)

    def count(self, bad: tuple[Value, ...], n: int) -> None:
        """Counts the values of `n` lines."""
        for value in bad:
            known = value in self.values or len(self.values) < NAMES
            self.values[value if known else Value(OTHER_NAMES, value.text)] += n


@dataclass(slots=True)
class LogScan:
    """What a log holds.

    Attributes:
        n_lines: Lines, what carriage returns end included.
        n_bad: How many hold NaN or Inf as a value.
        n_stretches: In how many stretches.
        stretches: The first `KEPT` of them.
        n_mentions: How many lines have the words, but no value.
        mention: The first of those.
        series: The losses and gradient norms that spike or climb, in logs that are data.
        n_records: How many lines are records of fastguard itself, which are not judged here.
        problem: Why the log could not be read to its end, or that it is empty; or None.
    """

    n_lines: int = 0
    n_bad: int = 0
    n_stretches: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    n_mentions: int = 0
    mention: Line | None = None
    series: list[tuple[Series, Growth | None]] = field(default_factory=list)
    n_records: int = 0
    problem: str | None = None

    @property
    def found(self) -> bool:
        """Whether there is anything bad in the log."""
        return self.n_bad > 0 or bool(self.series)


class Run:
    """Bad lines of one epoch that follow each other: the most that a bad log holds.

    Args:
        shape: That of the first.
        line: The first, which has been counted.

    Attributes:
        n: How many came after the first.
        bad: How many of those hold what.
        number: That of the last.
        last: The last, and which bytes of it say its place.
        furthest: That whose batch is the greatest; a bar may be drawn anew, at 0.
    """

    def __init__(self, shape: Shape, line: bytes) -> None:
        self.bad: Counter[tuple[Value, ...]] = Counter()
        self.n = self.number = 0
        self.last = self.furthest = (shape.where, line)
        self._shape = shape
        self._named = _named(shape.where)
        self._epoch = _whole_epoch(shape.where, line)
        self._batch = shape.where.batch
        self._most = int(line[slice(*self._batch)]) if self._batch else 0

    def goes_on(self, number: int, line: bytes, shape: Shape) -> bool:
        """Takes a line, if it is one of them."""
        where = shape.where
        if shape is not self._shape:
            same = bool(shape.bad) and shape.dialect == self._shape.dialect
            if not same or _named(where) != self._named:
                return False
            self._shape, self._batch = shape, where.batch
        if where.epoch and _whole_epoch(where, line) != self._epoch:
            return False
        self.n += 1
        self.bad[shape.bad] += 1
        self.number, self.last = number, (where, line)
        if self._batch is None:
            self.furthest = self.last
        elif (batch := int(line[self._batch[0] : self._batch[1]])) >= self._most:
            self._most, self.furthest = batch, self.last
        return True


def _named(where: Where) -> list[bool]:
    """Which parts of its place a line names."""
    return [span is None for span in where]


def _whole_epoch(where: Where, line: bytes) -> bytes:
    """The epoch that a line names, without its fraction; b"" if it names none."""
    return line[slice(*where.epoch)].partition(b".")[0] if where.epoch else b""
