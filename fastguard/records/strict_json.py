"""Values as JSON that every parser reads.

JSON (RFC 8259) has no NaN and no infinity; Python writes them anyway, and jq, JavaScript and most
databases then refuse the line. Here they become the strings `"NaN"`, `"Infinity"`, `"-Infinity"`,
as in the JSON mapping of Protocol Buffers: nothing is lost, and `float()` reads them back. null
would be shorter, but could not tell a NaN loss from one that was never given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 1 << 15
"""Of a shortened value. A character has at most 12 bytes in JSON, so the line of a record stays
below the 512 KiB that readers take for one."""

DEEPEST = 32
_MORE = "…"
_ITEM = 4  # characters that an item needs beside its text
_MOST_BITS = 1024


def strict(value: Any) -> Any:
    """The value as dicts with string keys, lists, strings, finite numbers, bools and None.

    What JSON cannot hold otherwise becomes its `str`.

    Example:
        >>> strict({"norm": float("nan"), "batch": (3, 1.5)})
        {'norm': 'NaN', 'batch': [3, 1.5]}
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int)):  # a union would be made each time
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value)


def shortened(value: Any, room: int = MOST_CHARACTERS) -> Any:
    """A value of any kind and size as `strict` would have it, with a bound on its size and depth.

    What does not fit is cut off or left out where `…` stands; what cannot be shown says so. It
    raises nothing, whatever the methods of the value do.

    Args:
        value: Anything: nested beyond the recursion limit, in a cycle, an integer of 5000 digits.
        room: Characters of text it may hold, about.

    Example:
        >>> shortened({"batch": (3, 1.5), "files": ["a" * 100, "b"]}, room=60)
        {'batch': [3, 1.5], 'files': ['aaaaaaaaaaaaaaaaaaaaaaaaa…', '…']}
    """
    if value is None:
        return None
    return _Shortened(room).of(value, 0)


class _Shortened:
    """Makes values of what room is left."""

    def __init__(self, room: int) -> None:
        self._room = room

    def of(self, value: Any, depth: int) -> Any:
        self._room -= _ITEM
        try:
            if isinstance(value, float) or value is None:
                return strict(value)
            if isinstance(value, int):
                return self._integer(value)
            if isinstance(value, str):
                return self._text(value)
            if isinstance(value, (Mapping, list, tuple)):
                if depth == DEEPEST:
                    return _MORE
                if isinstance(value, Mapping):
                    return self._mapping(value, depth + 1)
                return self._list(value, depth + 1)
            return self._text(str(value))
        except Exception as error:  # the class of the value decides what its methods do
            return _cannot_be_shown(value, error)

    def _integer(self, value: int) -> Any:
        bits = int.bit_length(value)
        if bits <= _MOST_BITS:
            self._room -= bits // 4
            return value
        return f"{value >> (bits - 64) << 4:#x}"[:-1] + f"… ({bits} bits)"

    def _text(self, text: str) -> str:
        room = max(self._room, 0)
        self._room -= len(text)
        return text if len(text) <= room else text[: max(room - 1, 0)] + _MORE

    def _list(self, values: Sequence[Any], depth: int) -> list[Any]:
        found: list[Any] = []
        for item in values:
            if self._room <= 0:
                return [*found, _MORE]
            found.append(self.of(item, depth))
        return found

    def _mapping(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in values.items():
            if self._room <= 0:
                return {**found, _MORE: _MORE}
            name = self._name(key)  # before the item, which may need all the room
            found[name] = self.of(item, depth)
        return found

    def _name(self, key: Any) -> str:
        try:
            return self._text(key if isinstance(key, str) else str(key))
        except Exception as error:  # as in `of`
            return _cannot_be_shown(key, error)


def _cannot_be_shown(value: object, error: Exception) -> str:
    return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def dumps(value: Any, *, indent: int | None = None) -> str:
    """`json.dumps` of `strict(value)`, safe to print: see `encode`."""
    if indent is None:
        return encode(strict(value))
    text = json.dumps(strict(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return "\n".join(map(_printable, text.split("\n")))


def encode(value: Any) -> str:
    """`dumps` of a value that is strict already.

    Letters of all scripts stay as they are. What is not printable is escaped as JSON does, so that
    a file or a name in it cannot command the terminal it is printed on, and every stream can encode
    it: control characters beyond those that JSON must escape, overrides of the direction of text,
    lone surrogates.

    Example:
        >>> print(encode({"é": chr(0x9B) + "2J" + chr(0x202E)}))
        {"é": "\\u009b2J\\u202e"}
    """
    return _printable(_encode(value))


_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode  # dumps makes one each time


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    # Outside of strings JSON is printable ASCII, so all that is found here is in one.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
