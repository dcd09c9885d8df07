"""`scan_log`: every NaN and Inf of a log, as stretches of bad lines that belong together.

A running mean that is NaN once stays NaN to the end of its epoch: ten thousand lines, one finding.
So the bad lines of an epoch are joined, until a line like the first of them measures something, and
all of it is finite. Memory does not depend on the length of the log.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from fastguard.commands.scan import huggingface
from fastguard.commands.scan.foreign import NotTextError
from fastguard.commands.scan.huggingface import HuggingFace, bare_bar
from fastguard.commands.scan.lightning import Lightning
from fastguard.commands.scan.lines import Line, read_lines
from fastguard.commands.scan.plain import Passed, Plain
from fastguard.commands.scan.reading import Place, Reading
from fastguard.commands.scan.table import Table
from fastguard.commands.scan.ultralytics import Ultralytics
from fastguard.commands.scan.values import Value, first_nonfinite, has_nonfinite

KEPT = 1000
"""Stretches that are told one by one; the others are counted."""

NAMES = 64
"""Names of values that are told; the others are counted together, under `OTHER_NAMES`."""

OTHER_NAMES = "(others)"

EXCERPT = 200
"""Characters of a line that are kept."""


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
    """

    dialect: str
    first_line: int
    last_line: int
    first: Place
    last: Place
    n_lines: int
    values: Counter[Value]
    excerpt: str


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
        problem: Why the log could not be read to its end, or that it is empty; or None.
    """

    n_lines: int = 0
    n_bad: int = 0
    n_stretches: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    n_mentions: int = 0
    mention: Line | None = None
    problem: str | None = None


def scan_log(file: BinaryIO) -> LogScan:
    """Reads a log to its end.

    Args:
        file: Open for reading in binary; need not be seekable.

    Returns:
        What was found up to where it could be read; `problem` says why not further.

    Example:
        >>> import io
        >>> found = scan_log(io.BytesIO(b"epoch 3\\nbatch 15 loss 0.5\\nbatch 16 loss nan\\n"))
        >>> found.n_bad, found.stretches[0].first_line, found.stretches[0].first.batch
        (1, 3, 16)
    """
    scanner = _Scanner()
    try:
        for line in read_lines(file):
            scanner.take(line)
    except EOFError:
        scanner.found.problem = "it is gzip that ends too soon"
    except NotTextError as error:
        scanner.found.problem = str(error)
    except (OSError, zlib.error) as error:
        scanner.found.problem = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    if not scanner.found.n_lines and scanner.found.problem is None:
        scanner.found.problem = "it is empty: there is no line to look at"
    return scanner.found


class _Scanner:
    """Keeps the place in the run and the stretch that is going on."""

    def __init__(self) -> None:
        self.found = LogScan()
        self._dialects = (Table(), Ultralytics(), Lightning(), HuggingFace())
        self._plain = Plain()
        self._passed = Passed()
        self._place = Place()
        self._stretch: Stretch | None = None
        self._dicts = False  # whether the bars of this log count the steps of dicts
        self._without_step: Stretch | None = None

    def take(self, line: Line) -> None:
        self.found.n_lines += 1
        if self._dicts and (step := bare_bar(line.text)) is not None:
            self._take_step(step)
            return
        suspect = has_nonfinite(line.text)
        reading = next(filter(None, (d.read(line.text) for d in self._dialects)), None)
        if reading is None:
            if not suspect and self._stretch is None:
                self._passed.add(line.text)
                return
            reading = self._plain.read(line.text)
        self._place = self._passed.place(self._place)
        if reading is None:
            if suspect:
                self._mention(line)
            return
        self._dicts |= reading.dialect == huggingface.NAME
        self._place = reading.place.within(self._place)
        if reading.bad:
            self._bad(line, reading)
        else:
            if suspect:
                self._mention(line)
            if reading.measured and self._stretch and self._stretch.dialect == reading.dialect:
                self._stretch = None

    def _bad(self, line: Line, reading: Reading) -> None:
        self.found.n_bad += 1
        stretch = self._stretch
        if stretch is None or _epoch(stretch.first) != _epoch(self._place):
            stretch = self._begin(line, reading)
        stretch.last_line = line.number
        if (self._place.batch or 0) >= (stretch.last.batch or 0):  # a bar may be drawn anew, at 0
            stretch.last = self._place
        stretch.n_lines += 1
        for value in reading.bad:
            known = value in stretch.values or len(stretch.values) < NAMES
            stretch.values[value if known else Value(OTHER_NAMES, value.text)] += 1
        self._without_step = stretch if self._dicts and self._place.step is None else None

    def _take_step(self, step: int) -> None:
        """The bar after a bad dict says its step."""
        stretch = self._without_step
        if stretch is None:
            return
        stretch.last = replace(stretch.last, step=step)
        if stretch.n_lines == 1:
            stretch.first = stretch.last
        self._without_step = None

    def _begin(self, line: Line, reading: Reading) -> Stretch:
        stretch = Stretch(
            dialect=reading.dialect,
            first_line=line.number,
            last_line=line.number,
            first=self._place,
            last=self._place,
            n_lines=0,
            values=Counter(),
            excerpt=_excerpt(line.text),
        )
        self._stretch = stretch
        self.found.n_stretches += 1
        if len(self.found.stretches) < KEPT:
            self.found.stretches.append(stretch)
        return stretch

    def _mention(self, line: Line) -> None:
        self.found.n_mentions += 1
        if self.found.mention is None:
            self.found.mention = Line(line.number, _around_word(line.text))


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:EXCERPT]


def _around_word(text: str) -> str:
    """A long line from a little before its NaN or Inf on."""
    start = max(0, first_nonfinite(text) - EXCERPT // 2)
    end = start + EXCERPT
    return "..." * (start > 0) + _excerpt(text[start:end]) + "..." * (end < len(text))


def _epoch(place: Place) -> int | None:
    return None if place.epoch is None else math.floor(place.epoch)
