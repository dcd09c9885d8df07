"""`scan_log`: every NaN and Inf of a log, as stretches of bad lines that belong together.

A running mean that is NaN once stays NaN to the end of its epoch: ten thousand lines, one finding.
So the bad lines of an epoch are joined, until a line like the first of them measures something, and
all of it is finite. Memory does not depend on the length of the log.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from fastguard.commands.scan import documents, huggingface, json_lines
from fastguard.commands.scan.events import EventsError, read_scalars
from fastguard.commands.scan.foreign import NotTextError
from fastguard.commands.scan.found import LogScan, Run, Stretch
from fastguard.commands.scan.huggingface import bare_bar
from fastguard.commands.scan.json_lines import JsonLines
from fastguard.commands.scan.lines import Block, Line, read_blocks, text_of
from fastguard.commands.scan.plain import Passed
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.rows import Rows
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.suspects import BAR, ENDS, Suspects
from fastguard.commands.scan.table import Table
from fastguard.commands.scan.tokens import first_nonfinite
from fastguard.commands.scan.values import Value, has_nonfinite

KEPT = 1000
"""Stretches that are told one by one; the others are counted."""

STEPS = 10
"""Steps of a stretch that are told one by one."""

LONG = 1000
"""Characters of an object that its excerpt is made of."""

EXCERPT = 200
"""Characters of a line that are kept."""

TENSORBOARD = "tensorboard"


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
    problem = None
    try:
        for block in scanner.without_document(read_blocks(file)):
            scanner.take(block)
    except EOFError:
        problem = "it is gzip that ends too soon"
    except NotTextError as error:
        problem = str(error)
    except (OSError, zlib.error) as error:
        problem = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    return scanner.finish(problem)


def scan_events(path: str) -> LogScan:
    """Reads an event file of TensorBoard to its end; its lines are its scalars.

    Args:
        path: The file.
    """
    scanner = _Scanner()
    problem = None
    try:
        for number, step, tag, value in read_scalars(path):
            scanner.take_scalar(number, step, tag, value)
    except EventsError as error:
        problem = str(error)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}"
    return scanner.finish(problem)


class _Scanner:
    """Keeps the place in the run and the stretch that is going on."""

    def __init__(self) -> None:
        self.found = LogScan()
        self._series = AllSeries()
        self._table = Table(self._series)
        self._json = JsonLines(self._series)
        self._shapes = Shapes()
        self._passed = Passed(self._shapes.where, self._shapes.is_setting)
        self._place = NOWHERE
        self._stretch: Stretch | None = None
        self._run: Run | None = None
        self._dicts = False  # whether the bars of this log count the steps of dicts
        self._without_step: Stretch | None = None

    def finish(self, problem: str | None) -> LogScan:
        """All that was found."""
        self._judge_waiting()
        self._end_run()
        found = self.found
        found.series = self._series.found()
        found.problem = problem
        if problem is None and not found.n_lines:
            found.problem = "it is empty: there is no line to look at"
        if problem is None and found.n_records and found.n_records == found.n_lines:
            found.problem = "it holds records of fastguard; use: fastguard report"
        return found

    def without_document(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Reads the JSON document that a log may begin with; gives the rest of the log."""
        parts = [next(blocks, Block(1, b"")).data]
        size = len(parts[0])
        while size <= documents.LIMIT:
            parts = [b"".join(parts)]
            if not documents.may_begin(parts[0]):
                break
            try:
                entries, end = documents.read_document(parts[0])
            except documents.NoDocumentError as error:
                if not error.cut_short:
                    break
            else:
                self._take_document(entries, parts[0][:end])
                yield Block(1 + parts[0].count(b"\n", 0, end), parts[0][end:])
                yield from blocks
                return
            tried = size  # each try reads all of it
            while size < 4 * tried and (more := next(blocks, None)) is not None:
                parts.append(more.data)
                size += len(more.data)
            if size == tried:
                break
        yield Block(1, b"".join(parts))
        yield from blocks

    def take(self, block: Block) -> None:
        """Reads the lines of a block."""
        data = block.data
        lines = data.replace(b"\r", b"\n") if b"\r" in data else data
        suspects: Suspects | None = None
        at, size = 0, len(lines)
        number, counted = block.number, 0
        while at < size:
            if self._run is None and not self._table.waits and not lines.startswith(b'{"', at):
                suspects = suspects or Suspects(lines)
                suspect = suspects.after(at, *self._ends())
                begin = size if suspect >= size else lines.rfind(b"\n", at, suspect) + 1
                begin = max(at, begin)
                self._pass(lines[at:begin])
                if begin >= size:
                    return
                at = begin
            end = lines.find(b"\n", at)
            end = size if end < 0 else end
            line = lines[at:end]
            if line and not line.isspace():
                number, counted = number + data.count(b"\n", counted, at), at
                if self._run is not None:
                    shape = self._shapes.known(line)
                    if shape is None or not self._run.goes_on(number, line, shape):
                        self._end_run()
                        continue
                else:
                    self._take(number, line)
                self.found.n_lines += 1
            at = end + 1

    def _ends(self) -> Iterator[re.Pattern[bytes]]:
        """What may end the stretch that is going on, or say its step."""
        if self._stretch is not None:
            if self._stretch.dialect in ENDS:
                yield ENDS[self._stretch.dialect]
            if self._dicts:
                yield BAR

    def take_scalar(self, number: int, step: int, tag: str, value: float) -> None:
        """Takes a value of an event file."""
        self.found.n_lines += 1
        place = Place(step=step)
        if not math.isfinite(value):
            bad = (Value(tag, str(value)),)
            self._data(number, Reading(TENSORBOARD, place, bad), f"{tag} {value}")
            return
        numbers = {tag: value} if self._series.judges(tag) else {}
        measured = self._stretch is not None and any(
            name == tag for name, _ in self._stretch.values
        )
        self._data(number, Reading(TENSORBOARD, place, (), measured, None, numbers), "")

    def _take_document(self, entries: Iterator[documents.Entry], text: bytes) -> None:
        for number, values in entries:
            self.found.n_lines += 1
            finite = json_lines.is_finite(values.values())
            if not self._take_object(number, values, finite=finite):
                reading = self._json.read(values)
                self._data(number, reading, str(values)[:LONG] if reading.bad else "")
        self._table.give_up()
        if not self.found.n_lines and text.strip(b" \t\r\n[]{}"):
            self.found.n_lines += 1

    def _take_json(self, number: int, line: bytes) -> bool:
        found, finite = json_lines.parse(line)
        if found is None:
            return False
        if not self._take_object(number, found, finite=finite):
            reading = self._json.read(found)
            if reading.dialect == json_lines.RECORD:
                self.found.n_records += 1
            else:
                self._table.give_up()
                self._data(number, reading, text_of(line) if reading.bad else "")
        return True

    def _take_object(self, number: int, found: Mapping[str, Any], *, finite: bool) -> bool:
        """Takes an object that waits to be judged with others, as most do."""
        if not finite or not self._json.add(number, found):
            return False
        self._end_run()
        if len(self._json.waiting) >= self._json.WAITING:
            self._judge_waiting()
        return True

    def _judge_waiting(self) -> None:
        waiting = self._json.waiting
        if not waiting:
            return
        rows = self._json.rows()
        self._json.waiting = []
        if rows is not None:
            self._judge(rows, json_lines.NAME)
            return
        for number, found, _ in waiting:
            self._data(number, self._json.read(found), str(found)[:LONG])

    def _judge(self, rows: Rows, dialect: str) -> None:
        before = self._place
        self._passed.forget()
        for name, (at, values) in rows.columns.items():
            self._series.take_all(
                name,
                [rows.lines[i] for i in at],
                lambda i, at=at: rows.place(at[i]).within(before),
                values,
            )
        self._place = rows.place(len(rows.lines) - 1).within(before)
        if rows.measured and self._stretch is not None and self._stretch.dialect == dialect:
            self._stretch = None

    def _pass(self, lines: bytes) -> None:
        if not lines:
            return
        self._judge_waiting()
        self.found.n_lines += sum(map(bool, map(bytes.strip, lines.split(b"\n"))))
        self._passed.add_all(lines)

    def _take(self, number: int, line: bytes) -> None:
        if line.startswith(b'{"') and self._take_json(number, line):
            return
        self._judge_waiting()
        if self._table.waits:
            text = text_of(line)
            if (reading := self._table.read(text)) is not None:
                self._data(number, reading, text)
                return
        if self._dicts and self._stretch is not None and b"%|" in line:
            step = bare_bar(text_of(line))
            if step is not None:
                self._end_run()
                self._take_step(step)
                return
        self._end_run()
        shape = self._shapes.of(line)
        if not shape.bad:
            if shape.suspect:
                self._mention(number, line)
            self._dicts |= shape.dialect == huggingface.NAME
            if shape.dialect is None:
                self._passed.add_all(line)
            else:
                self._passed.add(shape.where, line)
            if shape.measured and self._stretch and self._stretch.dialect == shape.dialect:
                self._stretch = None
            return
        place = shape.where.place(line)
        if place.epoch is None:
            self._place = place.within(self._passed.place(self._place))
        else:
            self._place = place
            self._passed.forget()
        self._dicts |= shape.dialect == huggingface.NAME
        self._bad(number, line, shape.dialect or "", shape.bad)
        self._run = Run(shape, line)

    def _end_run(self) -> None:
        """Counts the lines that were as the one before."""
        run, stretch = self._run, self._stretch
        self._run = None
        if run is None or stretch is None or not run.n:
            return
        self.found.n_bad += run.n
        stretch.n_lines += run.n
        stretch.last_line = run.number
        for bad, n in run.bad.items():
            stretch.count(bad, n)
        (where, last), (where_furthest, furthest_line) = run.last, run.furthest
        self._place = where.place(last).within(self._place)
        furthest = where_furthest.place(furthest_line).within(self._place)
        if (furthest.batch or 0) >= (stretch.last.batch or 0):
            stretch.last = furthest
        self._without_step = stretch if self._dicts and self._place.step is None else None

    def _data(self, number: int, reading: Reading, text: str) -> None:
        """A line that is data: its names and its place are its own."""
        self._judge_waiting()
        self._end_run()
        self._passed.forget()
        self._place = reading.place.within(self._place)
        for name, value in reading.numbers.items():
            self._series.take(name, number, self._place, value)
        if reading.bad:
            self._bad(number, text.encode(errors="replace"), reading.dialect, reading.bad)
            stretch, step = self._stretch, self._place.step
            if stretch and step is not None and len(stretch.steps) < STEPS:
                if not stretch.steps or stretch.steps[-1] != step:
                    stretch.steps.append(step)
            return
        if text and has_nonfinite(text):
            self._mention(number, text.encode(errors="replace"))
        if reading.measured and self._stretch and self._stretch.dialect == reading.dialect:
            self._stretch = None

    def _bad(self, number: int, line: bytes, dialect: str, bad: tuple[Value, ...]) -> None:
        self.found.n_bad += 1
        stretch = self._stretch
        if stretch is None or _epoch(stretch.first) != _epoch(self._place):
            stretch = self._begin(number, line, dialect)
        stretch.last_line = number
        if (self._place.batch or 0) >= (stretch.last.batch or 0):  # a bar may be drawn anew, at 0
            stretch.last = self._place
        stretch.n_lines += 1
        stretch.count(bad, 1)
        self._without_step = stretch if self._dicts and self._place.step is None else None

    def _take_step(self, step: int) -> None:
        """The bar after a bad dict says its step."""
        stretch = self._without_step
        if stretch is None:
            return
        stretch.last = stretch.last._replace(step=step)
        if stretch.n_lines == 1:
            stretch.first = stretch.last
        self._without_step = None

    def _begin(self, number: int, line: bytes, dialect: str) -> Stretch:
        stretch = Stretch(
            dialect=dialect,
            first_line=number,
            last_line=number,
            first=self._place,
            last=self._place,
            n_lines=0,
            values=Counter(),
            excerpt=_excerpt(text_of(line[: 8 * EXCERPT])),
        )
        self._stretch = stretch
        self.found.n_stretches += 1
        if len(self.found.stretches) < KEPT:
            self.found.stretches.append(stretch)
        return stretch

    def _mention(self, number: int, line: bytes) -> None:
        self.found.n_mentions += 1
        if self.found.mention is None:
            self.found.mention = Line(number, _around_word(text_of(line)))


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:EXCERPT]


def _around_word(text: str) -> str:
    """A long line from a little before its NaN or Inf on."""
    start = max(0, first_nonfinite(text) - EXCERPT // 2)
    end = start + EXCERPT
    return "..." * (start > 0) + _excerpt(text[start:end]) + "..." * (end < len(text))


def _epoch(place: Place) -> int | None:
    return None if place.epoch is None else math.floor(place.epoch)
