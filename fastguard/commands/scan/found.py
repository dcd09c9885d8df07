"""What a scan has found: stretches of bad lines, and all of a log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastguard.commands.scan.lines import Line
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.series import Growth, Series
from fastguard.commands.scan.shapes import SHAPE, Shape
from fastguard.commands.scan.values import Value


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
    """Bad lines that follow each other and differ in digits alone: the most that a bad log holds.

    Args:
        shape: That of all of them.
        line: The first, which has been counted.

    Attributes:
        n: How many came after it.
        number, last: The line number and the text of the last.
        furthest: The line whose batch is the greatest; a bar may be drawn anew, at 0.
    """

    def __init__(self, shape: Shape, line: bytes) -> None:
        self.shape = shape
        self.n = self.number = 0
        self.last = self.furthest = line
        self._key = line.translate(SHAPE)
        self._epoch = slice(*(shape.where.epoch or (0, 0)))
        self._epoch_text = line[self._epoch]
        self._batch = slice(*shape.where.batch) if shape.where.batch else None
        self._most = int(line[self._batch]) if self._batch else 0

    def goes_on(self, number: int, line: bytes) -> bool:
        """Takes a line, if it is one of them."""
        if line.translate(SHAPE) != self._key or line[self._epoch] != self._epoch_text:
            return False
        self.n += 1
        self.number, self.last = number, line
        if self._batch is None:
            self.furthest = line
        elif (batch := int(line[self._batch])) >= self._most:
            self._most, self.furthest = batch, line
        return True
