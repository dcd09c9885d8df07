"""`scan_log`: reads a log block by block, and dispatches each kind of line to its parser.

Rows of tables, JSON objects and lines of numbers are read many at a time. In other text, only lines
that may hold NaN or Inf, or that may end a stretch of bad lines, are parsed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO

from fastguard.commands.scan import documents, json_lines
from fastguard.commands.scan.budget import KNOWN, NEW, ROW, Budget, n_lines
from fastguard.commands.scan.cursor import Cursor
from fastguard.commands.scan.events import EventsError, read_scalars
from fastguard.commands.scan.findings import Findings
from fastguard.commands.scan.foreign import NotTextError
from fastguard.commands.scan.found import LogScan
from fastguard.commands.scan.insets import BARS, SPACES, header_of, object_around
from fastguard.commands.scan.json_lines import JsonLines
from fastguard.commands.scan.lines import Block, read_blocks, text_of
from fastguard.commands.scan.objects import rows_of
from fastguard.commands.scan.reading import Place, Reading
from fastguard.commands.scan.shapes import Shapes
from fastguard.commands.scan.table import Table
from fastguard.commands.scan.text import TextReader
from fastguard.commands.scan.values import Value

LONG = 1000
"""Number of characters of an object used for its excerpt."""

TENSORBOARD = "tensorboard"


def scan_log(file: BinaryIO, *, name: str = "value", full: bool = False) -> LogScan:
    """Reads a log to its end.

    Args:
        file: Binary file, open for reading; need not be seekable.
        name: Name of the file, which is the metric if MLflow wrote it. Default: `"value"`.
        full: Whether to analyze every line without a bound on the time. Default: False.

    Returns:
        The findings in the readable part; `problem` explains why reading stopped early.

    Example:
        >>> import io
        >>> found = scan_log(io.BytesIO(b"epoch 3\\nbatch 15 loss 0.5\\nbatch 16 loss nan\\n"))
        >>> found.n_bad, found.stretches[0].first_line, found.stretches[0].first.batch
        (1, 3, 16)
    """
    scanner = _Scanner(Budget(unlimited=full), name)
    problem = None
    try:
        for block in scanner.without_document(read_blocks(file)):
            scanner.take(block)
    except EOFError:
        problem = "the log is truncated gzip data"
    except NotTextError as error:
        problem = str(error)
    except (OSError, zlib.error) as error:
        problem = f"the log cannot be read: {getattr(error, 'strerror', None) or error}"
    return scanner.finish(problem)


def scan_events(path: str) -> LogScan:
    """Reads a TensorBoard event file to its end; each scalar counts as a line.

    Args:
        path: The file.
    """
    scanner = _Scanner(Budget(unlimited=True))
    problem = None
    try:
        for number, step, tag, value in read_scalars(path):
            scanner.take_scalar(number, step, tag, value)
    except EventsError as error:
        problem = str(error)
    except OSError as error:
        problem = f"the log cannot be read: {error.strerror or error}"
    return scanner.finish(problem)


class _Scanner:
    """Scans one log; keeps the state between lines, such as the current table or stretch."""

    def __init__(self, budget: Budget, name: str = "value") -> None:
        self._budget = budget
        shapes = Shapes(budget)
        self._findings = Findings(shapes, budget)
        self._table = Table(self._findings.series, name)
        self._json = JsonLines(self._findings.series, budget)
        self._text = TextReader(shapes, self._findings, budget, self._take_inset)

    def finish(self, problem: str | None) -> LogScan:
        """Returns all results."""
        self._findings.end_run()
        found = self._findings.found
        found.series = self._findings.series.found()
        found.problem = problem
        if problem is None and not found.n_lines:
            found.problem = "the log is empty"
        if problem is None and found.n_records and found.n_records == found.n_lines:
            found.problem = "the log contains fastguard records; use: fastguard report"
        return found

    def without_document(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Reads the JSON document that a log may begin with; yields the rest of the log."""
        parts = [next(blocks, Block(1, b""))]
        if documents.may_begin(parts[0].data):
            with suppress(documents.NoDocumentError):
                parts = [self._take_first(parts, blocks)]
        yield from parts
        yield from blocks

    def _take_first(self, parts: list[Block], blocks: Iterator[Block]) -> Block:
        """Reads the document in a block, or in all blocks if it may end later, up to its limit.

        Raises:
            NoDocumentError: The blocks are not a document; `parts` then has the blocks that were
                read.
        """
        try:
            return self._take_document(parts[0].data, whole=False)
        except documents.NoDocumentError as error:
            if not error.cut_short:
                raise
        size = len(parts[0].data)
        for block in blocks:
            parts.append(block)
            size += len(block.data)
            if size > documents.LIMIT:
                break
        if size > documents.LIMIT:
            raise documents.NoDocumentError(cut_short=True)
        return self._take_document(b"".join(part.data for part in parts), whole=True)

    def take(self, block: Block) -> None:
        """Reads the lines of a block."""
        self._budget.earn(len(block.data))
        cursor = Cursor(block)
        if block.number == 1 and self._table.waits:
            self._begin_table(cursor)
        while cursor.skip_blank():
            if self._budget.spent:
                self._findings.end_run()
                if not self._search(cursor):
                    return
                self._take_line(cursor)
                continue
            json = cursor.starts(b'{"')
            if not json and not self._table.waits:
                self._text.take(cursor)
            elif not self._take_rows(cursor, json=json):
                self._take_line(cursor)

    def _begin_table(self, cursor: Cursor) -> None:
        """Begins the printed table whose header is the first line of the log, if there is one."""
        lines, begin = cursor.lines, cursor.at
        for _ in range(3):  # the header, a separator line, and the first row
            end = lines.find(b"\n", begin)
            if end < 0:
                return
            header = header_of(lines, begin, end, cursor.at)
            if header is not None and header.delimiter in (SPACES, BARS):
                self._table.begin(header)
                return
            begin = end + 1

    def _search(self, cursor: Cursor) -> bool:
        """Counts the lines of a block for which no budget is left.

        Returns:
            Whether reading stopped at a line that may contain the first finding of the log.
        """
        end = cursor.size
        if not self._findings.found.n_bad and self._budget.reserve():
            end = cursor.value()
        self._findings.count(
            cursor.number, cursor.lines[cursor.at : end], cursor.number_at(end - 1)
        )
        cursor.at = end
        return not cursor.done

    def _take_line(self, cursor: Cursor) -> None:
        """Reads one line of any kind."""
        self._budget.spend(KNOWN)
        line = cursor.line()
        self._take(cursor.number, line)
        self._findings.found.n_lines += 1
        cursor.at += len(line) + 1

    def _take_rows(self, cursor: Cursor, *, json: bool) -> bool:
        """Reads the next structured lines together; returns whether there were any."""
        if not json:
            end, text = self._table.rows(cursor.lines, cursor.at)
            if not text:
                return False
            numbers = cursor.numbers(end, text.count(b"\n"))
            rows = self._table.read_rows(text, numbers)
            self._findings.judge(rows, lambda i: self._take(numbers[i], rows.text(i).encode()))
        else:
            each = cursor.objects()
            if not each:
                return False
            objects = json_lines.parse_lines(each)
            end = cursor.at + sum(map(len, each[: len(objects)])) + len(objects)
            numbers = cursor.numbers(end, len(objects))
            self._take_objects(objects, numbers, lambda i: text_of(each[i]))
            self._table.give_up()
        cursor.at = end
        return True

    def _take_inset(self, cursor: Cursor) -> bool:
        """Reads the indented object around the next line, or begins the table with this row."""
        lines, at, line = cursor.lines, cursor.at, cursor.line()
        self._budget.spend(ROW)
        if not line.lstrip().startswith(b'"'):
            header = header_of(lines, at, at + len(line), cursor.without_header)
            if header is None:
                cursor.without_header = at
            else:
                self._table.begin(header)
            return header is not None
        inset = object_around(lines, at)
        if inset is None:
            return False
        found, end = inset
        self._take_object(cursor.number, found, lambda: text_of(line))
        cursor.at = lines.find(b"\n", end) + 1 or cursor.size
        self._findings.found.n_lines += n_lines(lines[at : cursor.at])
        return True

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

    def _take_document(self, data: bytes, *, whole: bool) -> Block:
        """Reads a JSON document, and returns the text after it.

        Raises:
            NoDocumentError: The data does not begin with a whole document.
        """
        batches, end = documents.read_document(data, whole=whole)
        text = data[:end]
        self._budget.earn(end)
        for numbers, objects in batches:
            if self._budget.spent:
                self._count_document(numbers[0], text)
                break
            self._budget.spend(len(numbers) // 2)
            self._take_objects(objects, numbers, lambda i, objects=objects: _text_of(objects[i]))
        self._table.give_up()
        if not self._findings.found.n_lines and text.strip(b" \t\r\n[]{}"):
            self._findings.found.n_lines += 1
        return Block(1 + text.count(b"\n"), data[end:])

    def _count_document(self, number: int, text: bytes) -> None:
        """Counts the lines of a document from this line number on."""
        begin = 0
        for _ in range(number - 1):
            begin = text.index(b"\n", begin) + 1
        self._findings.count(number, text[begin:], number + text[begin:].rstrip().count(b"\n"))

    def _take_objects(
        self,
        objects: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
        text: Callable[[int], str],
    ) -> None:
        rows = rows_of(objects, numbers, text, self._json, self._findings.series)
        self._findings.judge(
            rows, lambda i: self._take_object(numbers[i], objects[i], lambda: text(i))
        )

    def _take_json(self, number: int, line: bytes) -> bool:
        self._budget.spend(ROW)
        found = json_lines.parse(line) if line.rstrip().endswith(b"}") else None
        if not isinstance(found, dict):
            return False
        self._table.give_up()
        self._take_object(number, found, lambda: text_of(line))
        return True

    def _take_object(self, number: int, found: Mapping[str, Any], text: Callable[[], str]) -> None:
        """Reads one object individually."""
        self._budget.spend(NEW)
        reading = self._json.read(found)
        if reading.dialect == json_lines.RECORD:
            self._findings.found.n_records += 1
        else:
            self._findings.data(number, reading, text() if reading.bad else "")

    def _take(self, number: int, line: bytes) -> None:
        if line.startswith(b'{"') and self._take_json(number, line):
            return
        if self._table.waits:
            self._budget.spend(ROW)
            text = text_of(line)
            if (reading := self._table.read(text)) is not None:
                self._findings.data(number, reading, text)
                return
        self._text.take_line(number, line)


def _text_of(found: Mapping[str, Any]) -> str:
    """The beginning of an object, for its excerpt."""
    return str(dict(islice(found.items(), LONG // 4)))[:LONG]
