"""JSON logs that are not one object per line.

`trainer_state.json` of Transformers, lists of metrics, histories, and sequences of objects, which
may be indented, separated by commas, or in a list that is still being written.

{"log_history": [{"epoch": 0.1, "loss": NaN, "step": 6}, ...], "best_metric": null, ...}
[{"step": 6, "loss": NaN}, ...]
{"loss": [2.3, NaN], "val_loss": [2.2, NaN]}
{"step": 6, "loss": NaN}, {"step": 7, "loss": 0.5}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastguard.commands.scan.json_lines import parse_finite
from fastguard.commands.scan.objects import ColumnRows

LIMIT = 32 << 20
"""Maximum size of a document in bytes; the parsed values may take thirty times as much memory."""

LONG = 1 << 16
"""A first line of at least this many bytes is assumed to begin a document."""

_BEGIN = re.compile(rb"[\s\x1e]*(?:\{\s*\"|\[\s*(?:\{|\]))")
_DECODER = json.JSONDecoder()
_LIST = re.compile(r"\s*:\s*\[(?=\s*\{)")  # a list of objects
_SPACE = re.compile(r"[\s,\x1e]*")
TOGETHER, ROWS = 512, 4096
"""Maximum number of objects, and of rows of lists, that are yielded together."""

DEPTHS = 8
"""Maximum number of nesting depths at which objects are located in bulk."""

_CELLS = frozenset({int, float, bool, str, type(None)})
COUNTED = "epoch"
"""The meaning of an index into lists of numbers if no list is a place: the epoch, as in Keras."""

Batch = tuple[Sequence[int], Sequence[Mapping[str, Any]]]
"""Line numbers, and the objects of a document, or the rows formed by its lists."""


class NoDocumentError(Exception):
    """The data is not a JSON document.

    Attributes:
        cut_short: Whether more text could complete it.
    """

    def __init__(self, *, cut_short: bool) -> None:
        super().__init__()
        self.cut_short = cut_short


def may_begin(data: bytes) -> bool:
    """Whether a log with this beginning may be a document: JSON, but not one object per line.

    Example:
        >>> may_begin(b'{\\n  "best_metric": null,'), may_begin(b'{"step": 1, "loss": 0.5}\\n{"st')
        (True, False)
    """
    if not _BEGIN.match(data):
        return False
    first, _, rest = data.lstrip().partition(b"\n")
    if first.startswith(b'{"') and first.rstrip().endswith(b"}") and rest.startswith(b'{"'):
        return False
    if len(first) >= LONG:
        return True
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        return True
    return isinstance(whole, list) or rest.lstrip()[:1] == b"{" or _holds_lists(whole)


def read_document(data: bytes, *, whole: bool) -> tuple[Iterator[Batch], int]:
    """Returns the objects in a document or a sequence of objects, and the offset of its end.

    Args:
        data: The beginning of the log.
        whole: Whether the data is the whole log. A sequence is read only if it is.

    Raises:
        NoDocumentError: The data is not a document, or is incomplete.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise NoDocumentError(cut_short=error.end >= len(data)) from None
    if (value := parse_finite(data)) is not None:
        return _together(_batches(text.rstrip(), value)), len(data.rstrip())
    begin = _after_space(text, 0)
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise NoDocumentError(cut_short=False) from None
    except ValueError as error:
        at = getattr(error, "pos", 0)
        cut_short = "Unterminated string" in str(error) or len(text) - at < 32
        if not (whole and cut_short and text.startswith("[", begin)):
            raise NoDocumentError(cut_short=cut_short) from None
        return _sequence(text, begin + 1)
    if isinstance(value, dict) and text.startswith("{", _after_space(text, end)):
        if not whole:
            raise NoDocumentError(cut_short=True)
        return _sequence(text, begin)
    return _together(_batches(text[:end], value)), len(text[:end].encode())


def _sequence(text: str, at: int) -> tuple[Iterator[Batch], int]:
    """The consecutive objects from `at` on, and the offset of their end in bytes."""
    numbers: list[int] = []
    values: list[Any] = []
    number, begin = 1 + text.count("\n", 0, at), at
    while text.startswith("{", after := _after_space(text, at)):
        number += text.count("\n", begin, after)
        begin = after
        try:
            value, at = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            break
        numbers.append(number)
        values.append(value)
    if not values:
        raise NoDocumentError(cut_short=False)
    return _together(iter([(numbers, values)])), len(text[:at].encode())


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None  # the pattern also matches the empty string
    return space.end()


def _holds_lists(value: dict[str, Any]) -> bool:
    values = [inner for _, inner in _one_level(value)]
    return any(isinstance(v, list) and v and isinstance(v[0], dict | float | int) for v in values)


def _batches(text: str, value: Any) -> Iterator[Batch]:
    lines = _Lines(text)
    if isinstance(value, list):
        yield _objects(lines, text.index("[") + 1, value)
        return
    if not isinstance(value, dict):
        return
    rest = {}
    columns: dict[str, list[Any]] = {}
    has_objects = False
    begin = 0
    opened = None
    for name, inner in _one_level(value):
        if not isinstance(inner, list) or not inner:
            rest[name] = inner
            continue
        types = {*map(type, inner)}
        if types == {dict}:
            has_objects = True
            quoted = json.dumps(name.rpartition("/")[2])
            begin = text.find(quoted, begin)
            while begin >= 0 and not (opened := _LIST.match(text, begin + len(quoted))):
                begin = text.find(quoted, begin + 1)
            if begin >= 0 and opened:
                begin = opened.end()
                yield _objects(lines, begin, inner)
            else:  # the text spells the name differently, for example with \u escapes
                # ends the search, since a hostile document may have many such names
                begin = len(text)
                yield [1] * len(inner), inner
        elif types <= _CELLS:
            columns[name] = inner
        else:
            rest[name] = inner
    yield from _rows(columns)
    if columns or has_objects:  # all other entries describe the run, unless they hold lists
        rest = {name: inner for name, inner in rest.items() if isinstance(inner, list) and inner}
    if rest:
        yield [1], [rest]


def _one_level(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(item, list) for item in inner.values()):
            yield from ((f"{name}/{key}", item) for key, item in inner.items())
        else:
            yield name, inner


def _rows(columns: Mapping[str, list[Any]]) -> Iterator[Batch]:
    """The rows of lists of numbers. Later rows lack the values of shorter lists."""
    begin = 0
    for length in sorted({*map(len, columns.values())}):
        while begin < length:
            end = min(length, begin + ROWS)
            part: dict[str, Sequence[Any]] = {
                name: column[begin:end] for name, column in columns.items() if len(column) >= length
            }
            if "epoch" not in part and "step" not in part:
                part = {COUNTED: range(begin + 1, end + 1), **part}
            yield [1] * (end - begin), ColumnRows(part)
            begin = end


def _objects(lines: _Lines, at: int, values: list[Any]) -> Batch:
    """The objects in the list whose bracket precedes `at`."""
    return lines.numbers(at, values), [value for value in values if isinstance(value, dict)]


def _together(lists: Iterable[Batch]) -> Iterator[Batch]:
    """Joins short lists of objects, and splits long ones, into batches of `TOGETHER`."""
    numbers: list[int] = []
    objects: list[Mapping[str, Any]] = []
    for more, added in lists:
        if isinstance(added, ColumnRows):
            if numbers:
                yield numbers, objects
                numbers, objects = [], []
            yield more, added
            continue
        numbers += more
        objects += added
        whole = len(numbers) // TOGETHER * TOGETHER
        for begin in range(0, whole, TOGETHER):
            yield numbers[begin : begin + TOGETHER], objects[begin : begin + TOGETHER]
        numbers, objects = numbers[whole:], objects[whole:]
    if numbers:
        yield numbers, objects


class _Lines:
    """The line numbers of the objects in a document, found by counting braces in bulk.

    Args:
        text: The document.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._many = "\n" in text
        if not self._many:
            return
        characters = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
        self._newlines = np.flatnonzero(characters == ord("\n"))
        quotes = np.flatnonzero(characters == ord('"'))
        quotes = quotes[characters[quotes - 1] != ord("\\")]
        braces = np.flatnonzero((characters == ord("{")) | (characters == ord("}")))
        # only braces outside of strings
        self._braces = braces[np.searchsorted(quotes, braces) % 2 == 0]
        self._opens = characters[self._braces] == ord("{")
        self._depths = np.cumsum(np.where(self._opens, 1, -1))
        self._begins: dict[int, np.ndarray] = {}

    def numbers(self, at: int, values: list[Any]) -> Sequence[int]:
        """The line numbers of the objects in the list whose bracket precedes `at`."""
        objects = [value for value in values if isinstance(value, dict)]
        if not objects or not self._many:
            return [1] * len(objects)
        before = np.searchsorted(self._braces, at)
        begins = self._at_depth(int(self._depths[before - 1]) + 1 if before else 1)
        first = np.searchsorted(begins, at)
        begins = begins[first : first + len(objects)]
        # A string that ends in a backslash breaks the count of braces. In that case, the last
        # object is not at its computed offset.
        if len(begins) == len(objects) and all(
            self._is_at(int(begins[i]), objects[i]) for i in (0, -1)
        ):
            return (np.searchsorted(self._newlines, begins) + 1).tolist()
        return self._one_by_one(at, values)

    def _at_depth(self, depth: int) -> np.ndarray:
        """The offsets at which objects of this nesting depth begin."""
        if depth not in self._begins:
            if len(self._begins) >= DEPTHS:
                return np.zeros(0, np.int64)
            self._begins[depth] = self._braces[self._opens & (self._depths == depth)]
        return self._begins[depth]

    def _is_at(self, begin: int, value: Any) -> bool:
        try:
            return repr(_DECODER.raw_decode(self._text, begin)[0]) == repr(value)
        except (ValueError, RecursionError):
            return False

    def _one_by_one(self, at: int, values: list[Any]) -> list[int]:
        numbers = []
        for value in values:
            begin = _after_space(self._text, at)
            try:
                at = _DECODER.raw_decode(self._text, begin)[1]
            except ValueError:  # the list was not found in the text
                return [1] * sum(isinstance(value, dict) for value in values)
            if isinstance(value, dict):
                numbers.append(int(np.searchsorted(self._newlines, begin)) + 1)
        return numbers
