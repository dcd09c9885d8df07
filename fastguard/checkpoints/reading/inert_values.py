"""What a pickle becomes that is read and not run: plain containers, references, stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class StorageRef:
    """Bytes of the file: `n` elements of `dtype`, from element `start` of record `key`.

    `dtype` is None where the tensors that use the bytes say what they are.
    """

    key: str
    dtype: torch.dtype | None
    n: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that was not read: a view of a storage; offset, size and stride in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Attached(NamedTuple):
    """A tensor and the Python attributes that it carries."""

    value: Any
    state: Any

    def __repr__(self) -> str:  # what is inside may hold itself a billion times
        return "<tensor with attributes>"


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class of torch; `dtype` is None for untyped ones."""

    dtype: torch.dtype | None


class Name:
    """A class or function that the pickle names, and that is never looked up."""

    __slots__ = ("qualified_name",)

    def __init__(self, qualified_name: str) -> None:
        self.qualified_name = qualified_name

    def __repr__(self) -> str:
        return self.qualified_name[:200]


class StandIn:
    """An object of a class that is not loaded: what its pickle said of it, and no behaviour.

    Attributes:
        qualified_name: Of the class, or of the function that the pickle would have called for it.
        parts: Arguments, states and items, in the order in which it got them.
    """

    __slots__ = ("parts", "qualified_name")

    def __init__(self, qualified_name: str, *parts: Any) -> None:
        self.qualified_name = qualified_name
        self.parts: list[Any] = list(parts)

    def __repr__(self) -> str:
        return f"<{self.qualified_name[:200]}>"


class InertDict(dict):
    """A dict of the file that may have attributes as well (`state_dict._metadata`)."""

    attributes: Any = None

    def __repr__(self) -> str:
        return f"<dict of {len(self)}>"


class OpaqueKey:
    """A key of a dict that is not hashed: a set, an object, a tower of tuples, a huge number.

    Attributes:
        tensor: The key, if it is a tensor; else None.
    """

    __slots__ = ("tensor",)

    def __init__(self, key: Any) -> None:
        self.tensor = key if isinstance(key, TensorRef | Attached) else None

    def __str__(self) -> str:
        return "<key>"


@dataclass(frozen=True, slots=True)
class LongBytes:
    """Bytes in the pickle that are left where they are: a file may hold gigabytes of them.

    Attributes:
        start: First byte, from the beginning of the file.
        n_stored: Bytes there.
        n: Bytes that it is.
        is_text: Whether they are stored as the UTF-8 of Latin-1, as in protocol 2.
    """

    start: int
    n_stored: int
    n: int
    is_text: bool

    def __len__(self) -> int:
        return self.n


@dataclass(frozen=True, slots=True)
class LongText:
    """Text in the pickle that is left where it is; `n` characters in `n_stored` bytes."""

    start: int
    n_stored: int
    n: int

    def encoded(self, encoding: str) -> LongBytes | None:
        """The bytes, of Latin-1 text, which is how protocol 2 writes bytes; else None."""
        if encoding not in ("latin1", "latin-1"):
            return None
        return LongBytes(self.start, self.n_stored, self.n, is_text=True)


def kind_of(value: Any) -> str:
    """Names a value, without what is in it: that may be the same tuple a billion times."""
    return repr(value) if isinstance(value, Name | StandIn) else f"a {type(value).__name__}"


def plain_key(key: Any) -> Any:
    """The key, if its hash is cheap and cannot be chosen; else one that is hashed by identity."""
    kind = type(key)
    if kind in (str, bool, type(None), float, torch.dtype, StandIn, Name):
        return key
    if kind is int:
        return key if key.bit_length() <= 60 else OpaqueKey(key)
    if kind is bytes:
        return key if len(key) <= 1000 else OpaqueKey(key)
    if kind is tuple and len(key) <= 16 and all(map(_is_short, key)):
        return tuple(map(plain_key, key))
    return OpaqueKey(key)


def _is_short(part: Any) -> bool:
    return type(part) in (int, float, bool) or (type(part) is str and len(part) <= 1000)


def dict_of(items: list[Any]) -> dict[Any, Any]:
    """The dict of alternating keys and values."""
    if len(items) % 2:
        raise ValueError("a key without value")
    return {plain_key(items[i]): items[i + 1] for i in range(0, len(items), 2)}


def size_of(value: Any) -> int:
    """What a copy of it takes, roughly."""
    if isinstance(value, str | bytes | bytearray):
        return 3 * len(value)
    if isinstance(value, list | tuple | dict):
        return 8 * len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0
