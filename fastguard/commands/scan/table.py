"""Parses tables with a header, as written by Lightning's CSVLogger, Ultralytics and pandas.

epoch,step,train_loss,val_loss
0,9,nan,
0,9,,0.5

Cells are separated by commas, semicolons, tabs or bars. The header is the first line of the file,
after comments; later headers begin a new table. An empty cell means that nothing was measured, so a
row ends a stretch only if it has a finite value in a column that was bad.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from fastguard.commands.scan.columns import KINDS, NAMED_BY, is_place, kind_of, place_of
from fastguard.commands.scan.insets import (
    BARS,
    MLFLOW,
    OF_CLASSES,
    OF_MLFLOW,
    SPACES,
    Header,
    cells_of,
)
from fastguard.commands.scan.json_lines import number_of, parse
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.reading import NOWHERE, Place, Reading
from fastguard.commands.scan.rows import Column, Rows
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.spellings import canonical
from fastguard.commands.scan.values import Value, has_nonfinite
from fastguard.commands.scan.vocabulary import is_bound, is_metric, is_undefined

NAME = "table"

_DELIMITERS = "\t,;|"
_HEAD = re.compile(
    r"(?!.*[\s:=][+-]?\.?\d[\d.e+-]*$)"  # excludes "loss 0.5", which is not a name
    r"[^\W\d][\w./@%()\[\]:,|+*#&^~ -]{0,79}"
)
_DECIMAL_COMMA = re.compile(r"^(\s*[+-]?\d+),(\d+(?:[eE][+-]?\d+)?\s*)$")
_NO_CELL = re.compile(r"[\s:=]")
_CELL = rb'"?[^,;|\t\n"#]*+"?'
# Cells of places and judged columns. The pattern tries plain numbers first, which is 3x as fast.
_NUMBER = (
    rb"(?:[0-9]++(?:\.[0-9]*+)?+(?=[,;|\t\n])"
    rb'|"?[ ]*+(?:[+-]?(?:[0-9]++\.?[0-9]*+(?:e[+-]?[0-9]++)?|nan|inf(?:inity)?))?[ ]*+"?)'
)
_SPACED_NUMBER = rb"[+-]?(?:[0-9]++\.?[0-9]*+(?:e[+-]?[0-9]++)?|nan|inf(?:inity)?)(?=\s)"
_SPACED_CELL = rb"[+-]?(?:[0-9.][^\s\"]*+|nan|inf(?:inity)?|-+)(?=\s)"
MISSES = 256
"""A table ends after this number of consecutive lines that are not rows."""

MAX_ROWS = 4096
"""Maximum number of rows that are read together."""

_SENTENCE = Value("", "sentence")  # plain text that contains commas
_BOUND = Value("", "bound")


class Table:
    """Parses rows under the names of the header.

    Args:
        series: Decides which names are judged as series.
        metric: The name of the metric in a file that MLflow writes.
    """

    def __init__(self, series: AllSeries, metric: str = "value") -> None:
        self._series = series
        self._metric = metric
        self._begun = False
        self._delimiter = ""
        self._names: list[str] = []
        self._bad: set[int] = set()  # indices of columns whose last value was bad
        self._rows: re.Pattern[bytes] | None = None
        self._misses = 0

    @property
    def waits(self) -> bool:
        """Whether the next line may belong to a table."""
        return not self._begun or bool(self._names)

    def give_up(self) -> None:
        """Stops treating the log as a table."""
        self._begun, self._names = True, []

    def read(self, text: str) -> Reading | None:
        """Parses a line; None if it does not belong to a table."""
        if self._begun and not self._names:
            return None
        reading = self._read(text)
        self._misses = 0 if reading is not None else self._misses + 1
        if self._misses > MISSES:
            self.give_up()
        return reading

    def _read(self, text: str) -> Reading | None:
        is_comment = text.lstrip("\ufeff ").startswith("#")
        text = text.lstrip("\ufeff# ") if is_comment or text.startswith("\ufeff") else text
        if not self._begun and MLFLOW.fullmatch(text):
            self.begin(OF_MLFLOW)
        if not self._begun:
            head = self._take_head(text)
            self._begun = head is not None or not is_comment
            return head
        cells = _cells(text, self._delimiter)
        if not any(cell[-1:].isdigit() for cell in cells):
            if (head := self._take_head(text)) is not None:
                return head
        return self._row(cells) if len(cells) == len(self._names) else None

    def _take_head(self, text: str) -> Reading | None:
        for delimiter in (BARS,) if self._delimiter == BARS else _DELIMITERS:
            names = _cells(text, delimiter)
            named = (
                names[1:] if names[:1] == [""] else names
            )  # pandas does not name the index column
            if (
                len(names) > 1
                and all(map(_HEAD.fullmatch, named))
                and any(map(_is_known, named))
                and not has_nonfinite(text)
            ):
                self._begin(delimiter, names)
                return Reading(NAME, NOWHERE, measured=False)
        return None

    def begin(self, header: Header) -> None:
        """Begins a table that is printed within text."""
        names = header.names
        if header is OF_MLFLOW:
            names = [self._metric if name == "value" else name for name in names]
        self._begin(header.delimiter, names)

    def _begin(self, delimiter: str, names: list[str]) -> None:
        self._begun, self._misses = True, 0
        self._delimiter, self._names, self._bad = delimiter, names, set()
        self._of_classes = names[0].lower() in OF_CLASSES
        # pandas prints NaN for values that are missing
        self._may_miss = names[0] == "" or self._of_classes
        self._places = [is_place(name) for name in names]
        self._judged = [self._series.judges(name) for name in names]
        self._places_at = [(i, n) for i, n in enumerate(names) if self._places[i]]
        lower = [name.lower() for name in names]
        self._named_by = next((i for i, n in enumerate(lower) if n in NAMED_BY), None)
        self._value_at = lower.index("value") if "value" in lower else None
        self._rows = self._pattern()

    def _pattern(self) -> re.Pattern[bytes] | None:
        """Matches rows that can be read together; None if there are no numeric columns."""
        numbers = [p or j for p, j in zip(self._places, self._judged, strict=True)]
        named = self._named_by is not None and self._value_at is not None
        if self._delimiter == BARS or named or not any(numbers) or self._may_miss:
            return None
        number, cell, between = _NUMBER, _CELL, re.escape(self._delimiter.encode())
        if self._delimiter == SPACES:
            number, cell, between = _SPACED_NUMBER, _SPACED_CELL, rb"[ \t]++"
        cells = between.join(number if is_number else cell for is_number in numbers)
        begin = rb"[ \t]*+" if self._delimiter == SPACES else rb"(?!\s*\n)"
        return re.compile(rb"(?:%s%s *+\n){1,%d}+" % (begin, cells, MAX_ROWS), re.IGNORECASE)

    def rows(self, lines: bytes, at: int) -> tuple[int, bytes]:
        """The end and the text of the rows from `at` that can be read together; b"" if none."""
        found = self._rows.match(lines, at) if self._rows is not None and self._names else None
        return (at, b"") if found is None else (found.end(), found[0])

    def read_rows(self, rows: bytes, numbers: Sequence[int]) -> Rows:
        """Parses rows that can be read together; `numbers` are their line numbers."""
        delimiter, k = self._delimiter.encode(), len(self._names)
        if self._delimiter == SPACES:
            cells = rows.split()
        else:
            cells = rows.replace(b'"', b"").replace(b"\n", delimiter).split(delimiter)
            cells.pop()
        n = len(cells) // k
        finite = not _has_word(rows.lower())
        columns: dict[str, Column] = {}
        bad: defaultdict[int, list[Value]] = defaultdict(list)
        bad_at: defaultdict[int, set[int]] = defaultdict(set)
        mentions, odd = set(), set()
        for j, name in enumerate(self._names):
            column = cells[j::k]
            if self._judged[j] and not self._places[j]:
                columns[name] = _numbers(column)
            if finite or not _has_word(b"\n".join(column).lower()):
                continue
            for i, found in _words(name, column):
                if found is _SENTENCE and not self._has_place(
                    [cell.strip().decode(errors="replace") for cell in cells[i * k : i * k + k]]
                ):
                    odd.add(i)
                elif found is _SENTENCE or found is _BOUND or self._places[j]:
                    mentions.add(i)
                else:
                    bad[i].append(found)
                    bad_at[i].add(j)
        for i in odd:
            bad.pop(i, None)
            bad_at.pop(i, None)
        mentions -= bad.keys() | odd

        def place(i: int) -> Place:
            return place_of(
                (name, cells[i * k + j].decode().strip()) for j, name in self._places_at
            )

        epochs: dict[tuple[bytes, ...], float | None] = {}
        epoch_at = [j for j, name in self._places_at if kind_of(name) is KINDS[0]]

        def epoch(i: int) -> float | None:
            key = tuple([cells[i * k + j] for j in epoch_at])
            if key not in epochs:
                epochs[key] = place(i).epoch
            return epochs[key]

        each = rows.split(b"\n")
        measured = bytearray(n)
        for i in self._again_good(cells, bad_at, odd):
            measured[i] = 1
        return Rows(
            dialect=NAME,
            numbers=numbers,
            place=place,
            epoch=epoch,
            batches=any(kind_of(name) is KINDS[1] for _, name in self._places_at),
            steps=any(kind_of(name) is KINDS[2] for _, name in self._places_at),
            text=lambda i: text_of(each[i]),
            columns=columns,
            bad=dict(bad),
            measured=measured,
            mentions=sorted(mentions),
            odd=odd,
        )

    def _again_good(
        self, cells: Sequence[bytes], bad_at: Mapping[int, set[int]], odd: set[int]
    ) -> Iterator[int]:
        """The rows in which a bad column holds a number again."""
        begin, k = 0, len(self._names)
        for end in (*sorted(bad_at), len(cells) // k):
            for i in range(begin, end) if self._bad else ():
                row = cells[i * k : i * k + k]
                if i not in odd and any([row[j].rstrip()[-1:].isdigit() for j in self._bad]):
                    self._bad.clear()
                    yield i
                    break
            self._bad |= bad_at.get(end, set())
            begin = end + 1

    def _has_place(self, cells: list[str]) -> bool:
        """Whether the cells of the place are numbers, as in a row."""
        return bool(self._places_at) and all(cells[i][-1:].isdigit() for i, _ in self._places_at)

    def _row(self, cells: list[str]) -> Reading | None:
        bad, found, again_good, some = [], set(), False, False
        numbers: dict[str, float] = {}
        names, judged = self._names, self._judged
        # a row with the columns key, value and step
        if self._named_by is not None and self._value_at is not None:
            names, judged = names.copy(), judged.copy()
            names[self._value_at] = cells[self._named_by]
            judged[self._value_at] = self._series.judges(cells[self._named_by])
        for i, (name, cell) in enumerate(zip(names, cells, strict=True)):
            if not cell or self._places[i]:
                continue
            if cell[-1].isdigit():
                again_good |= i in self._bad
                some |= is_metric(name)
                if judged[i]:
                    if (number := number_of(cell)) is not None:
                        numbers[name] = number
            elif (value := _nonfinite(name, cell)) is _SENTENCE:
                if not self._has_place(cells):
                    return None
            elif value not in (None, _BOUND):
                bad.append(value)
                found.add(i)
        if self._of_classes or (self._may_miss and some):
            bad = []
        if bad:
            self._bad |= found
        elif again_good:
            self._bad.clear()
        place = place_of(
            (name, cell)
            for name, cell, place in zip(names, cells, self._places, strict=True)
            if place
        )
        return Reading(NAME, place, tuple(bad), bool(bad) or again_good, None, numbers)


def _words(name: str, column: Sequence[bytes]) -> Iterator[tuple[int, Value]]:
    """The rows of a column that hold NaN or Inf, and what they hold."""
    known: dict[bytes, Value | None] = {}
    for i, cell in enumerate(column):
        if cell[-1:].isdigit():
            continue
        if cell not in known:
            known[cell] = _nonfinite(name, text_of(cell).strip())
        if (value := known[cell]) is not None:
            yield i, value


def _has_word(lower: bytes) -> bool:
    return b"nan" in lower or b"inf" in lower or b"1.#" in lower


def _cells(text: str, delimiter: str) -> list[str]:
    if delimiter in (SPACES, BARS):
        return cells_of(text, delimiter)
    if delimiter not in text:
        return []
    cells = (
        next(csv.reader([text], delimiter=delimiter), []) if '"' in text else text.split(delimiter)
    )
    if delimiter != "," and "," in text:
        cells = [_DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells]
    return [cell.strip() for cell in cells]


@lru_cache(1024)
def _nonfinite(name: str, word: str) -> Value | None:
    """The NaN or Inf in a non-numeric cell, or None."""
    if not word or word[-1].isdigit() or not has_nonfinite(word):
        return None
    if _NO_CELL.search(word):
        return _SENTENCE
    return _BOUND if is_bound(name, canonical(word)) else Value(name, canonical(word))


def _numbers(column: Sequence[bytes]) -> Column:
    """The rows of a column that hold a finite number."""
    try:
        values = _floats(column)
    except ValueError:
        kept = [i for i, cell in enumerate(column) if cell and not cell.isspace()]
        values = _floats([column[i] for i in kept])
    else:
        kept = range(len(column))
    if all(map(math.isfinite, values)):  # excludes 1e999, which is infinite
        return kept, values
    pairs = [(i, value) for i, value in zip(kept, values, strict=True) if math.isfinite(value)]
    return [i for i, _ in pairs], [value for _, value in pairs]


def _floats(cells: Sequence[bytes]) -> Sequence[float]:
    """Converts cells to numbers; as one JSON array if possible, which is 4x as fast.

    Raises:
        ValueError: A cell is not a number.
    """
    found = parse(b"[" + b",".join(cells) + b"]")
    if isinstance(found, list) and len(found) == len(cells) and {*map(type, found)} == {float}:
        return found
    return list(map(float, cells))


def _is_known(name: str) -> bool:
    return (
        is_place(name)
        or is_metric(name)
        or is_undefined(name)
        or name.lower() in ("value", *NAMED_BY)
    )
