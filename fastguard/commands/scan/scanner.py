"""`scan_log`: reads a log block by block, each kind of line in the fastest way.

Rows of tables, JSON objects and lines of numbers are read many at a time. In other text, only lines
that may hold NaN or Inf, or may end a stretch of them, are parsed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, BinaryIO

from fastguard.commands.scan import documents, json_lines
from fastguard.commands.scan.bare import bare_lines
from fastguard.commands.scan.events import EventsError, read_scalars
from fastguard.commands.scan.findings import Findings
from fastguard.commands.scan.foreign import NotTextError
from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.huggingface import bare_bar
from fastguard.commands.scan.json_lines import JsonLines
from fastguard.commands.scan.lines import Block, read_blocks, text_of
from fastguard.commands.scan.objects import rows_of
from fastguard.commands.scan.reading import Place, Reading
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.suspects import BAR, ENDS, Suspects
from fastguard.commands.scan.table import Table
from fastguard.commands.scan.values import Value

LONG = 1000
"""Number of characters of an object used for its excerpt."""

TOGETHER = 512
"""Number of objects that are read together."""

TENSORBOARD = "tensorboard"

_BLANK = re.compile(rb"(?:[ \t\f\v]*+(?:\n|\Z))++")
_OBJECTS = re.compile(rb"(?:\{\"[^\n]*+\n){1,%d}+" % TOGETHER)


def scan_log(file: BinaryIO) -> LogScan:
    """Reads a log to its end.

    Args:
        file: Binary file, open for reading; need not be seekable.

    Returns:
        What was found in the readable part; `problem` says why reading stopped early.

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
    """Reads a TensorBoard event file to its end; each scalar counts as a line.

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
    """Keeps the state of a log between lines: a table, a stretch."""

    def __init__(self) -> None:
        self._shapes = Shapes()
        self._findings = Findings(self._shapes)
        self._table = Table(self._findings.series)
        self._json = JsonLines(self._findings.series)

    def finish(self, problem: str | None) -> LogScan:
        """Returns all results."""
        self._findings.end_run()
        found = self._findings.found
        found.series = self._findings.series.found()
        found.problem = problem
        if problem is None and not found.n_lines:
            found.problem = "it is empty: there is no line to scan"
        if problem is None and found.n_records and found.n_records == found.n_lines:
            found.problem = "it holds records of fastguard; use: fastguard report"
        return found

    def without_document(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Reads the JSON document that a log may begin with; yields the rest of the log."""
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
            tried = size  # each attempt parses all of it
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
        # Equal lengths keep offsets valid in both.
        lines = data.replace(b"\r\n", b" \n").replace(b"\r", b"\n") if b"\r" in data else data
        suspects: Suspects | None = None
        at, size = 0, len(lines)
        number, counted = block.number, 0
        while at < size:
            if (blank := _BLANK.match(lines, at)) is not None:
                at = blank.end()
                continue
            if self._findings.run is None:
                json = lines.startswith(b'{"', at)
                if not json and not self._table.waits:
                    suspects = suspects or Suspects(lines)
                    suspect = suspects.after(at, *self._ends())
                    begin = size if suspect >= size else lines.rfind(b"\n", at, suspect) + 1
                    begin = max(at, begin)
                    self._pass(lines[at:begin])
                    if begin >= size:
                        return
                    at = begin
                    json = lines.startswith(b'{"', at)
                number, counted = number + data.count(b"\n", counted, at), at
                if (end := self._take_rows(number, data, lines, at, json=json)) > at:
                    at = end
                    continue
            end = lines.find(b"\n", at)
            end = size if end < 0 else end
            line = lines[at:end]
            number, counted = number + data.count(b"\n", counted, at), at
            if not self._table.waits and (bare := bare_lines(lines, at)) is not None:
                self._take(number, line)
                self._findings.take_bare(bare, number + data.count(b"\n", at, max(at, bare.last)))
                at = bare.end
                continue
            if self._findings.run is not None:
                shape = self._shapes.known(line)
                if shape is None or not self._findings.run.goes_on(number, line, shape):
                    self._findings.end_run()
                    continue
            else:
                self._take(number, line)
            self._findings.found.n_lines += 1
            at = end + 1

    def _take_rows(self, number: int, data: bytes, lines: bytes, at: int, *, json: bool) -> int:
        """Reads structured lines together; returns the offset of their end."""
        if json:
            first = lines.find(b"\n", at) + 1
            if not isinstance(json_lines.parse(lines[at:first]), dict):
                return at
            found = _OBJECTS.match(lines, at)
            assert found is not None  # the first line is one
            each = found[0].split(b"\n")[:-1]
            objects = json_lines.parse_lines(each)
            end = at + sum(map(len, each[: len(objects)])) + len(objects)
            numbers = _numbers(number, data, at, end, len(objects))
            self._take_objects(objects, numbers, lambda i: text_of(each[i]))
            self._table.give_up()
            return end
        end, text = self._table.rows(lines, at)
        if not text:
            return at
        numbers = _numbers(number, data, at, end, text.count(b"\n"))
        rows = self._table.read_rows(text, numbers)
        self._findings.judge(rows, lambda i: self._take(numbers[i], rows.text(i).encode()))
        return end

    def _ends(self) -> Iterator[re.Pattern[bytes]]:
        """Patterns that may end the current stretch or give its step."""
        stretch = self._findings.stretch
        if stretch is not None:
            if stretch.dialect in ENDS:
                yield ENDS[stretch.dialect]
            if self._findings.dicts:
                yield BAR

    def take_scalar(self, number: int, step: int, tag: str, value: float) -> None:
        """Adds a value of an event file."""
        self._findings.found.n_lines += 1
        place = Place(step=step)
        if not math.isfinite(value):
            bad = (Value(tag, str(value)),)
            self._findings.data(number, Reading(TENSORBOARD, place, bad), f"{tag} {value}")
            return
        numbers = {tag: value} if self._findings.series.judges(tag) else {}
        stretch = self._findings.stretch
        measured = stretch is not None and any(name == tag for name, _ in stretch.values)
        self._findings.data(number, Reading(TENSORBOARD, place, (), measured, None, numbers), "")

    def _take_document(self, entries: Iterator[documents.Entry], text: bytes) -> None:
        while batch := list(islice(entries, TOGETHER)):
            numbers, objects = zip(*batch, strict=True)
            self._take_objects(objects, numbers, lambda i, objects=objects: str(objects[i])[:LONG])
        self._table.give_up()
        if not self._findings.found.n_lines and text.strip(b" \t\r\n[]{}"):
            self._findings.found.n_lines += 1

    def _take_objects(
        self,
        objects: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
        text: Callable[[int], str],
    ) -> None:
        rows = rows_of(objects, numbers, text, self._json, self._findings.series)
        self._findings.judge(rows, lambda i: self._take_object(numbers[i], objects[i], text(i)))

    def _take_json(self, number: int, line: bytes) -> bool:
        found = json_lines.parse(line)
        if not isinstance(found, dict):
            return False
        self._table.give_up()
        self._take_object(number, found, text_of(line))
        return True

    def _take_object(self, number: int, found: Mapping[str, Any], text: str) -> None:
        """Reads one object individually."""
        reading = self._json.read(found)
        if reading.dialect == json_lines.RECORD:
            self._findings.found.n_records += 1
        else:
            self._findings.data(number, reading, text if reading.bad else "")

    def _pass(self, lines: bytes) -> None:
        if not lines:
            return
        self._findings.found.n_lines += sum(map(bool, map(bytes.strip, lines.split(b"\n"))))
        self._findings.passed.add_all(lines)

    def _take(self, number: int, line: bytes) -> None:
        if line.startswith(b'{"') and self._take_json(number, line):
            return
        if self._table.waits:
            text = text_of(line)
            if (reading := self._table.read(text)) is not None:
                self._findings.data(number, reading, text)
                return
        findings = self._findings
        if findings.dicts and findings.stretch is not None and b"%|" in line:
            step = bare_bar(text_of(line))
            if step is not None:
                findings.end_run()
                findings.take_step(step)
                return
        findings.text(number, line, self._shapes.of(line))


def _numbers(first: int, data: bytes, begin: int, end: int, n: int) -> Sequence[int]:
    """The line numbers of `n` consecutive rows."""
    rows = data[begin:end]
    if b"\r" not in rows or b"\r" not in rows.replace(b"\r\n", b""):
        return range(first, first + n)
    ends = (character == b"\n" for character in re.findall(rb"\r(?!\n)|\n", rows))
    return list(accumulate(ends, initial=first))[:n]
