"""Single-document JSON logs: `trainer_state.json` of Transformers, lists of metrics, histories.

{"log_history": [{"epoch": 0.1, "loss": NaN, "step": 6}, ...], "best_metric": null, ...}
[{"step": 6, "loss": NaN}, ...]
{"loss": [2.3, NaN], "val_loss": [2.2, NaN]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LIMIT = 32 << 20
"""Maximum size of a document in bytes: parsed, a hostile one takes thirty times as much."""

LONG = 1 << 16
"""A first line of at least this many bytes is assumed to be a document."""

_BEGIN = re.compile(rb"\s*(?:\{\s*\"|\[\s*(?:\{|\]))")
_DECODER = json.JSONDecoder()
_LIST = re.compile(r"\s*:\s*\[")
_FLAT = re.compile(r'\{[^{}"]*+(?:"[^"\\]*+"[^{}"]*+)*+\}')  # an object without nested objects
_SPACE = re.compile(r"[\s,]*")
COUNTED = "epoch"
"""Unit of the position in a list of numbers if no list gives one: epochs, as in Keras."""


Entry = tuple[int, Mapping[str, Any]]
"""An object of a document: its line number, and its names and values."""


class NoDocumentError(Exception):
    """The data is not a JSON document.

    Attributes:
        cut_short: Whether more text could complete it.
    """

    def __init__(self, *, cut_short: bool) -> None:
        super().__init__()
        self.cut_short = cut_short


class _Lines:
    """Counts the lines of a text up to increasing offsets."""

    def __init__(self, text: str) -> None:
        self._text, self._number, self._counted = text, 1, 0

    def at(self, place: int) -> int:
        self._number += self._text.count("\n", self._counted, place)
        self._counted = place
        return self._number


def may_begin(data: bytes) -> bool:
    """Whether a log with this beginning may be a document: JSON, but not one object per line.

    Example:
        >>> may_begin(b'{\\n  "best_metric": null,'), may_begin(b'{"step": 1, "loss": 0.5}\\n{"st')
        (True, False)
    """
    if not _BEGIN.match(data):
        return False
    first = data.lstrip().partition(b"\n")[0]
    if len(first) >= LONG:
        return True
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        return True
    return isinstance(whole, list) or any(map(_is_list, whole.values()))


def read_document(data: bytes) -> tuple[Iterator[Entry], int]:
    """The objects in a document, and the offset of its end.

    Raises:
        NoDocumentError: The data is not a document, or is incomplete.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise NoDocumentError(cut_short=error.end >= len(data)) from None
    begin = len(text) - len(text.lstrip())
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise NoDocumentError(cut_short=False) from None
    except ValueError as error:
        at = getattr(error, "pos", 0)
        unended = "Unterminated string" in str(error)
        raise NoDocumentError(cut_short=unended or len(text) - at < 32) from None
    return _entries(text, begin, value), len(text[:end].encode())


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | float | int)


def _entries(text: str, begin: int, value: Any) -> Iterator[Entry]:
    lines = _Lines(text)
    if isinstance(value, list):
        yield from _objects(text, text.index("[", begin) + 1, lines, value)
        return
    if not isinstance(value, dict):
        return
    rest = {}
    columns: dict[str, list[Any]] = {}
    has_objects = False
    opened = None
    for name, inner in _one_level(value):
        if isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner):
            has_objects = True
            quoted = json.dumps(name.rpartition("/")[2])
            begin = text.find(quoted, begin)
            while begin >= 0 and not (opened := _LIST.match(text, begin + len(quoted))):
                begin = text.find(quoted, begin + 1)
            if begin >= 0 and opened:
                begin = opened.end()
                yield from _objects(text, begin, lines, inner)
            else:  # the text spells the name differently, as with \u escapes
                begin = len(text)  # a hostile document may have many such names
                yield from ((1, item) for item in inner)
        elif isinstance(inner, list) and inner and all(map(_is_number, inner)):
            columns[name] = inner
        else:
            rest[name] = inner
    length = max(map(len, columns.values()), default=0)
    for i in range(length):
        row: dict[str, Any] = {name: c[i] for name, c in columns.items() if i < len(c)}
        yield (1, row if "epoch" in row or "step" in row else {COUNTED: i + 1, **row})
    if rest and not columns and not has_objects:
        yield 1, rest


def _one_level(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(item, list) for item in inner.values()):
            yield from ((f"{name}/{key}", item) for key, item in inner.items())
        else:
            yield name, inner


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float | str) or item is None


def _objects(text: str, at: int, lines: _Lines, objects: Iterable[Any]) -> Iterator[Entry]:
    """The objects of the list whose bracket precedes `at`, with their line numbers."""
    for value in objects:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        number = lines.at(at)
        flat = _FLAT.match(text, at)
        at = flat.end() if flat else _DECODER.raw_decode(text, at)[1]
        if isinstance(value, dict):
            yield number, value
