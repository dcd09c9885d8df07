"""The values that `load_inert` makes from a pickle: containers, references, stand-ins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A range of the file: `n` elements of `dtype`, from element `start` of record `key`.

    Attributes:
        key: The name of the record.
        dtype: None if only the tensors that use the bytes define it.
        n: Number of elements.
        start: First element; always 0, except in files of torch before 1.6.
        n_stored: Number of elements of the whole record.
        view: The name of the range, if it is stored as a part of the record; else None.
    """

    key: str
    dtype: torch.dtype | None
    n: int
    start: int
    n_stored: int
    view: str | None


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that was not read: a view of a storage; offset, size and stride in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Attached(NamedTuple):
    """A tensor together with its Python attributes."""

    value: Any
    state: Any

    def __repr__(self) -> str:  # omits the contents, which may contain themselves a billion times
        return "<tensor with attributes>"


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class of torch; `dtype` is None if untyped."""

    dtype: torch.dtype | None


class Name:
    """A class or function named in the pickle and never looked up."""

    __slots__ = ("qualified_name",)

    def __init__(self, qualified_name: str) -> None:
        self.qualified_name: str = qualified_name

    def __repr__(self) -> str:
        return self.qualified_name[:200]


class StandIn:
    """An object whose class is not loaded; holds the pickled data and has no behavior.

    Attributes:
        qualified_name: Name of the class, or of the function that the pickle would have called.
        parts: Arguments, states and items, in the order received.
    """

    __slots__ = ("parts", "qualified_name")

    def __init__(self, qualified_name: str, *parts: Any) -> None:
        self.qualified_name: str = qualified_name
        self.parts: list[Any] = list(parts)

    def __repr__(self) -> str:
        return f"<{self.qualified_name[:200]}>"


class InertDict(dict[Any, Any]):
    """A dict from the file that may also have attributes (`state_dict._metadata`).

    Attributes:
        attributes: The states that the file gives the dict; each one is a dict of attributes.
    """

    attributes: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"<dict of {len(self)}>"


class InertSet(list[Any]):
    """A set from the file, kept as a list, since placeholders may not be hashable."""


class InertFrozenSet(tuple[Any, ...]):
    """A frozenset from the file; see `InertSet`."""


def hashable(items: Iterable[Any]) -> Iterable[Any]:
    """Returns the items.

    Raises:
        TypeError: A set cannot hold one of the items.
    """
    if any(map(_is_unhashable, items)):
        raise TypeError("a set that contains a list or a dict")
    return items


def _is_unhashable(value: Any) -> bool:
    if isinstance(value, list | dict):
        return True
    return type(value) is tuple and len(value) <= 16 and any(map(_is_unhashable_part, value))


def _is_unhashable_part(part: Any) -> bool:
    return isinstance(part, list | dict)


class InertText(str):
    """Stands for a path, device or layout; as a dict key it does not equal the same plain text."""


class OpaqueKey:
    """A dict key that is not hashed: an object, a deeply nested tuple, a huge number.

    Attributes:
        tensor: The key, if it is a tensor; else None.
    """

    __slots__ = ("_text", "tensor")

    def __init__(self, key: Any, text: str = "<key>") -> None:
        self._text = str(key) if isinstance(key, InertText) else text
        self.tensor: TensorRef | Attached | None = (
            key if isinstance(key, TensorRef | Attached) else None
        )

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True, slots=True)
class LongBytes:
    """Bytes that are left in the pickle, since a file may contain gigabytes of them.

    Attributes:
        start: First byte, counted from the beginning of the file.
        n_stored: Number of bytes stored.
        n: Number of bytes after decoding.
        is_text: Whether the bytes are stored as Latin-1 text in UTF-8, as in protocol 2.
    """

    start: int
    n_stored: int
    n: int
    is_text: bool

    def __len__(self) -> int:
        return self.n


@dataclass(frozen=True, slots=True)
class LongText:
    """Text that is left in the pickle; `n` characters in `n_stored` bytes."""

    start: int
    n_stored: int
    n: int

    def encoded(self, encoding: str) -> LongBytes | None:
        """Returns the bytes if the text is Latin-1, as protocol 2 writes bytes; else None."""
        if encoding not in ("latin1", "latin-1"):
            return None
        return LongBytes(self.start, self.n_stored, self.n, is_text=True)


def kind_of(value: Any) -> str:
    """Describes a value without its contents, which may be huge."""
    return repr(value) if isinstance(value, Name | StandIn) else f"a {type(value).__name__}"


def plain_key(key: Any) -> Any:
    """Returns the key if hashing it is cheap and safe; else a key that is hashed by identity.

    Raises:
        TypeError: No reader can use the key.
    """
    kind = type(key)
    if kind in (str, bool, type(None), float, torch.dtype, StandIn, Name):
        return key
    if kind is int:
        return key if key.bit_length() <= 60 else OpaqueKey(key)
    if kind is bytes:
        return key if len(key) <= 1000 else OpaqueKey(key)
    if kind is tuple and len(key) <= 16:
        if all(map(_is_short, key)):
            return tuple(map(plain_key, key))
    if _is_unhashable(key):
        raise TypeError("a key that is or contains a list or a dict")
    return OpaqueKey(key)


def _is_short(part: Any) -> bool:
    return type(part) in (int, float, bool) or (type(part) is str and len(part) <= 1000)


def add_items(target: dict[Any, Any], items: list[Any]) -> int:
    """Adds alternating keys and values to a dict; returns the number of values replaced.

    A replaced value stays in the dict under an opaque key, because keys that are equal here may
    differ for torch, and an unread value could hide a NaN.
    """
    if len(items) % 2:
        raise ValueError("a key without a value")
    pairs = dict(zip(map(plain_key, items[::2]), items[1::2], strict=True))
    if 2 * len(pairs) == len(items) and target.keys().isdisjoint(pairs):
        dict.update(target, pairs)
        return 0
    n_replaced = 0
    for key, value in zip(map(plain_key, items[::2]), items[1::2], strict=True):
        if key in target:
            dict.__setitem__(target, OpaqueKey(key, str(key)), target[key])
            n_replaced += 1
        dict.__setitem__(target, key, value)
    return n_replaced


def size_of(value: Any) -> int:
    """Returns the approximate size of a copy, in bytes."""
    if isinstance(value, str | bytes | bytearray):
        return 3 * len(value)
    if isinstance(value, list | tuple | dict):
        return 24 * len(value)  # 8 bytes per item, plus the time to check it
    return value.bit_length() // 8 if isinstance(value, int) else 0
