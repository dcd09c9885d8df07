"""Encodes values as JSON that every parser reads.

JSON (RFC 8259) has no NaN or infinity. Python writes them anyway, and jq, JavaScript and most
databases reject such a line. Here they become the strings `"NaN"`, `"Infinity"` and `"-Infinity"`,
as in the JSON mapping of Protocol Buffers; `float()` converts them back. `null` would be shorter,
but would not distinguish a NaN loss from a missing one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 1 << 15
"""Limit for a shortened value. A character takes at most 12 bytes in JSON, so a record's line stays
below the 512 KiB that readers accept."""

DEEPEST = 32
_MORE = "…"
_ITEM = 4  # number of characters that an item needs besides its text
_MAX_BITS = 1024


def strict(value: Any) -> Any:
    """Converts a value to dicts with string keys, lists, strings, finite numbers, bools and None.

    Other values become their `str`.

    Example:
        >>> strict({"norm": float("nan"), "batch": (3, 1.5)})
        {'norm': 'NaN', 'batch': [3, 1.5]}
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    # a tuple, since `str | int` would be created on each call
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value)


def shortened(value: Any, room: int = MAX_CHARACTERS) -> Any:
    """Converts a value like `strict`, with limited size and depth.

    `…` marks omitted parts. Never raises an error. If a method of the value raises one, the result
    is a text that says that the value cannot be shown.

    Args:
        value: Any value; it may be cyclic, nested beyond the recursion limit, or a huge integer.
        room: Approximate limit on the characters of text.

    Example:
        >>> shortened({"batch": (3, 1.5), "files": ["a" * 100, "b"]}, room=60)
        {'batch': [3, 1.5], 'files': ['aaaaaaaaaaaaaaaaaaaaaaaaa…', '…']}
    """
    if value is None:
        return None
    return _Shortened(room).of(value, 0)


class _Shortened:
    """Converts values within the remaining room."""

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
        except Exception as error:  # methods of a class may raise any error
            return _cannot_be_shown(value, error)

    def _integer(self, value: int) -> Any:
        bits = int.bit_length(value)
        if bits <= _MAX_BITS:
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
            name = self._name(key)  # computed before the item, which may use up the room
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
    """Returns `json.dumps(strict(value))`, safe to print: see `encode`."""
    if indent is None:
        return encode(strict(value))
    text = json.dumps(strict(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return "\n".join(map(_printable, text.split("\n")))


def encode(value: Any) -> str:
    """Encodes a value that `strict` has converted.

    Letters of all scripts are kept. Unprintable characters get a JSON escape, including control
    characters, direction overrides and lone surrogates that JSON itself would allow. A name in a
    file therefore cannot send commands to the terminal, and every stream can encode the text.

    Example:
        >>> print(encode({"é": chr(0x9B) + "2J" + chr(0x202E)}))
        {"é": "\\u009b2J\\u202e"}
    """
    return _printable(_encode(value))


# one encoder, since json.dumps creates one on each call
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    # Outside strings, JSON is printable ASCII, so all replacements are inside strings.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
