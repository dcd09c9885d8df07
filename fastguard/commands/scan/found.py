"""The results of a scan: stretches of bad lines, and the summary of a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastguard.commands.scan.budget import Counted
from fastguard.commands.scan.lines import Line
from fastguard.commands.scan.reading import Place, Where, whole_epoch
from fastguard.commands.scan.series import Growth, Series
from fastguard.commands.scan.shapes import Shape
from fastguard.commands.scan.values import Value

NAMES = 64
"""Maximum number of value names listed; further names are counted under `OTHER_NAMES`."""

OTHER_NAMES = "(others)"


@dataclass(slots=True)
class Stretch:
    """Consecutive bad lines in one epoch.

    Attributes:
        dialect: Dialect of the first line.
        first_line, last_line: Line numbers.
        first, last: Places in the run.
        n_lines: Number of lines, including each redraw of a progress bar.
        values: Number of lines in which each `Value` was bad.
        excerpt: The first line.
        steps: The first steps, if the log is structured.
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
    """Summary of a log.

    Attributes:
        n_lines: Number of lines, including those ended by carriage returns.
        n_bad: Number of lines with NaN or Inf as a value.
        n_stretches: Number of stretches.
        stretches: The first `KEPT` stretches.
        n_mentions: Number of lines that contain NaN or Inf only as words.
        mention: The first line of `n_mentions`.
        series: The losses and gradient norms that spike or climb, in structured logs.
        n_records: Number of lines that are fastguard records, which are not judged here.
        counted: The lines that were only searched, to bound the time.
        problem: Why the log was not read to its end, or that it is empty; else None.
    """

    n_lines: int = 0
    n_bad: int = 0
    n_stretches: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    n_mentions: int = 0
    mention: Line | None = None
    series: list[tuple[Series, Growth | None]] = field(default_factory=list)
    n_records: int = 0
    counted: Counted = field(default_factory=Counted)
    problem: str | None = None

    @property
    def found(self) -> bool:
        """Whether anything bad was found."""
        return self.n_bad > 0 or any(growth or series.alarms for series, growth in self.series)


class Run:
    """Consecutive bad lines of one epoch, added at little cost per line.

    Args:
        shape: Shape of the first line.
        line: The first line, already counted.

    Attributes:
        n: Number of lines after the first.
        bad: Number of lines after the first, per set of bad values.
        number: Line number of the last line.
        last: The last line, and the bytes that name its place.
        furthest: The line with the largest batch number, since a bar may be redrawn at 0.
    """

    def __init__(self, shape: Shape, line: bytes) -> None:
        self.bad: Counter[tuple[Value, ...]] = Counter()
        self.n: int = 0
        self.number: int = 0
        self.last: tuple[Where, bytes] = (shape.where, line)
        self.furthest: tuple[Where, bytes] = self.last
        self._shape = shape
        self._epoch = whole_epoch(shape.where, line)
        self._most = int(line[slice(*shape.where.batch)]) if shape.where.batch else 0

    def extend(self, numbers: Sequence[int], lines: Sequence[bytes], shape: Shape) -> int:
        """Adds consecutive lines of one shape, as far as they belong to the run.

        Args:
            numbers: The line numbers.
            lines: The lines.
            shape: The shape of the lines.

        Returns:
            The number of lines that belong to the run.
        """
        n, where = len(lines), shape.where
        if shape is not self._shape and not self._continues(shape):
            return 0
        if where.epoch is not None:
            begin, end = where.epoch
            epochs = [line[begin:end].partition(b".")[0] for line in lines]
            if epochs.count(self._epoch) < n:
                n = next(i for i, epoch in enumerate(epochs) if epoch != self._epoch)
        if not n:
            return 0
        self._shape = shape
        self._add(numbers[n - 1], n, lines.__getitem__)
        return n

    def extend_alike(self, number: int, lines: bytes, stride: int) -> None:
        """Adds lines that differ from the last one only in digits without a meaning.

        Args:
            number: Line number of the last of them.
            lines: The lines, with line feeds.
            stride: Length of each.
        """
        n = len(lines) // stride
        self._add(number, n, lambda i: lines[i * stride : (i + 1) * stride - 1])

    def _add(self, number: int, n: int, line: Callable[[int], bytes]) -> None:
        where = self._shape.where
        self.n += n
        self.bad[self._shape.bad] += n
        self.number, self.last = number, (where, line(n - 1))
        if where.batch is None:
            self.furthest = self.last
            return
        batches = [line(i)[slice(*where.batch)] for i in range(n)]
        if int(most := max(batches)) >= self._most:
            at = n - 1 - batches[::-1].index(most)
            self._most, self.furthest = int(most), (where, line(at))

    def _continues(self, shape: Shape) -> bool:
        """Whether lines of another shape may belong to the run."""
        named, before = _named(shape.where), _named(self._shape.where)
        return bool(shape.bad) and shape.dialect == self._shape.dialect and named == before


def _named(where: Where) -> list[bool]:
    """The parts of the place that a line names."""
    return [span is None for span in where]
