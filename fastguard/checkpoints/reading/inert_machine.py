"""The stack and the memo on which the opcodes of a pickle work; see `inert_unpickler`."""

from __future__ import annotations

import codecs
import pickle
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.bounded_reader import BoundedReader
from fastguard.checkpoints.reading.inert_calls import Call, call, give_state, meaning
from fastguard.checkpoints.reading.inert_values import (
    InertDict,
    InertSet,
    Name,
    StandIn,
    StorageRef,
    StorageType,
    add_items,
    hashable,
    size_of,
)
from fastguard.checkpoints.reading.value_types import check_object

_DEVICE = re.compile(r"[A-Za-z_]\w*(:\d+)?")

# Costs, in the unit of the budget: one byte, or 3 to 4 ns.
_STEP = 100  # an opcode
_MEMO = 100
_TUPLE = 100
_OBJECT = 300  # a list or a dict
_ITEM = 150  # a key and a value
_REPLACED = 700  # a value that another value replaces
_NAME, _NEW_NAME = 200, 1500
_CALL = 900  # a call or a new object, and its result
_VALUE = 3000  # a call of a function by name, whose name must be checked
_PARTIAL = 30_000  # a call of an object, which may be a chain of partials
_STORAGE = 1200


class InertMachine(BoundedReader):
    """Reads one pickle.

    Args:
        file: Open for reading, at the start of the pickle; left positioned after its end.
        origin: Byte offset of `file` within the whole file, if it is a part of one.
        spent: See `BoundedReader`.
        has_views: Whether the pickle is in the format of torch before 1.6, which also stored views.
    """

    def __init__(
        self, file: IO[bytes], origin: int = 0, spent: int = 0, *, has_views: bool = False
    ) -> None:
        super().__init__(file, origin, spent)
        self._has_views = has_views
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._names: dict[tuple[str, str], Any] = {}
        self.refused: dict[str, None] = {}  # what `weights_only=True` refuses, other than names
        # storages, and parts of storages under their own names
        self.storages: dict[str, StorageRef] = {}

    def run(self, handlers: Mapping[bytes, Callable[[Any], object]]) -> Any:
        """Returns the tree that the pickle describes.

        Args:
            handlers: For each opcode, the function that executes it on this machine.
        """
        read, n_steps = self.file.read, 0
        while code := read(1):
            self._budget -= _STEP
            n_steps += 1
            if self._budget < 0:
                raise DamagedFile(
                    f"the pickle seems designed to be slow or huge: after {n_steps:,} steps it "
                    "exceeds what a checkpoint needs"
                )
            handler = handlers.get(code)
            if handler is None:
                raise DamagedFile(f"the pickle has an opcode {code!r}, which is not supported here")
            if code == pickle.STOP:
                return self.stack.pop()
            handler(self)
        raise DamagedFile("the pickle ends too soon")

    @property
    def names(self) -> list[str]:
        """Returns the classes and functions that the pickle names, except dtypes and storages."""
        found = (
            value.qualified_name if isinstance(value, Name) else value.name
            for value in self._names.values()
            if isinstance(value, Name | Call)
        )
        return list(dict.fromkeys(found))

    # Operations on the stack.

    def push(self, value: Any) -> None:
        """Pushes a value."""
        self.stack.append(value)

    def mark(self) -> None:
        """Begins a new stack above the current one."""
        self.charge(_OBJECT)
        self._below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """Returns the values pushed since the last mark, and removes them and the mark."""
        items = self.stack
        self.stack = self._below.pop()
        return items

    def pop(self) -> None:
        """Removes the value on top, or the mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def push_tuple(self, n: int) -> None:
        """Replaces the `n` values on top with a tuple of them."""
        self.charge(_TUPLE)
        items = tuple(self.stack[-n:]) if n else ()
        if len(items) < n:
            raise IndexError("an opcode needs more values than the stack contains")
        del self.stack[len(self.stack) - n :]
        self.push(items)

    def made(self, value: Any) -> None:
        """Pushes a new list or dict."""
        self.charge(_OBJECT)
        self.push(value)

    # Operations on the memo.

    def push_memo(self, index: int) -> None:
        """Pushes the value with this index in the memo."""
        self.push(self.memo[index])

    def memoize(self, index: int) -> None:
        """Stores the value on top in the memo."""
        if index < 0:
            raise ValueError("negative index in the memo")
        self.charge(_MEMO)
        self.memo[index] = self.stack[-1]

    # Numbers and text.

    def push_int(self) -> None:
        """Reads an integer or a bool in decimal digits."""
        raw = self.read_digits()
        self.push({b"00": False, b"01": True}.get(raw, None) if len(raw) == 2 else None)
        if self.stack[-1] is None:
            self.stack[-1] = int(raw, 0)

    def push_long(self, n: int) -> None:
        """Reads an integer of `n` bytes."""
        self.push(int.from_bytes(self.read_bytes(n), "little", signed=True))

    def push_quoted(self) -> None:
        """Reads quoted text of Python 2."""
        raw = self.read_line().strip()
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
            raise ValueError("quoted text lacks a quote")
        self.push_python2(codecs.escape_decode(raw[1:-1])[0])  # type: ignore[attr-defined]

    def push_python2(self, raw: bytes) -> None:
        """Pushes Python 2 text: UTF-8, the default of torch; other text is read as Latin-1."""
        try:
            self.push(raw.decode())
        except UnicodeDecodeError:
            self.refused["text that is not UTF-8"] = None
            self.push(raw.decode("latin1"))

    # Operations on containers.

    def append(self, items: list[Any], *, to_set: bool = False) -> None:
        """Adds items to the list or set on top."""
        target = self.stack[-1]
        if isinstance(target, list) and isinstance(target, InertSet) == to_set:
            target.extend(hashable(items) if to_set else items)
        elif isinstance(target, StandIn):
            self.charge(_OBJECT)
            target.parts.append(items)
        else:
            raise TypeError(f"items are added to a value of type {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        """Adds alternating keys and values to the dict on top."""
        target = self.stack[-1]
        if isinstance(target, dict):
            self._add_items(target, items)
        elif isinstance(target, StandIn):
            target.parts.append(self.dict_of(items))
        else:
            raise TypeError(f"keys are added to a value of type {type(target).__name__}")

    def dict_of(self, items: list[Any]) -> dict[Any, Any]:
        """Returns a new dict of alternating keys and values."""
        self.charge(_OBJECT)
        found: dict[Any, Any] = {}
        self._add_items(found, items)
        return found

    def _add_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        self.charge(_STEP + _ITEM * len(items) // 2 + _REPLACED * add_items(target, items))

    def append_one(self) -> None:
        """Adds the value on top to the list below it."""
        self.charge(2 * _STEP)
        item = self.stack.pop()
        self.append([item])

    def set_one(self) -> None:
        """Adds the key and value on top to the dict below them."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    # Names, calls, objects.

    def push_global(self, module: Any, name: Any) -> None:
        """Pushes the placeholder for a name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a class or function is not text")
        key = module, name
        self.charge(_NAME)
        if key not in self._names:
            self.charge(_NEW_NAME)
            self._names[key] = meaning(module, name)
        self.push(self._names[key])

    def reduce(self) -> None:
        """Replaces a function and its arguments with a placeholder for the result."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("the arguments of a call are not a tuple")
        self.charge(_CALL + _STEP * len(arguments))
        if not isinstance(function, Call):
            self.charge(_VALUE if isinstance(function, Name) else _PARTIAL)
        if self._budget >= 0:
            self.charge(sum(map(size_of, arguments)))
        if self._budget < 0:
            raise DamagedFile("the pickle copies the same values too many times")
        self.push(call(function, arguments))

    def new_object(self, arguments: Any, keywords: Any = None) -> None:
        """Replaces a class with a placeholder for an object of it."""
        kind = self.stack.pop()
        if not isinstance(kind, Name):
            raise TypeError(f"the class of an object is a value of type {type(kind).__name__}")
        check_object(kind)
        self.charge(_CALL)
        parts = [part for part in (arguments, keywords) if part]
        self.push(StandIn(kind.qualified_name, *parts))

    def instance(self, function: Any, arguments: list[Any]) -> None:
        """Pushes the placeholder for a call."""
        self.push(function)
        self.push(tuple(arguments))
        self.reduce()

    def build(self) -> None:
        """Gives the state on top to the value below it."""
        state = self.stack.pop()
        target = self.stack[-1]
        self.charge(size_of(state))
        if isinstance(target, StandIn):
            self.charge(_OBJECT)
            target.parts.append(state)
        elif isinstance(target, InertDict):
            target.attributes += (state,)
            self.charge(size_of(target.attributes))
        else:
            give_state(target, state, self.charge)

    def persistent(self, pid: Any) -> None:
        """Pushes a reference to a storage."""
        kind = pid[0] if isinstance(pid, tuple) and pid else None
        if kind == "module":  # source code of a module, in files of torch 0.x
            return self.push(pid[1])
        if kind not in ("storage", b"storage"):
            raise DamagedFile("the file refers to something that is not a torch storage")
        view: Any = None
        if self._has_views:
            *pid, view = pid
        _, storage_type, key, location, n_stored = pid
        name, start, n = (None, 0, n_stored) if view is None else view
        if not isinstance(storage_type, StorageType) or not isinstance(key, str | int):
            raise DamagedFile("the file refers to a storage by an invalid name")
        if self._has_views and storage_type.dtype is None:  # float8 and other new dtypes
            raise DamagedFile(
                "it has a storage without an element type, which torch cannot load from its format "
                "before 1.6"
            )
        place = location.decode("latin1") if isinstance(location, bytes) else location
        if not isinstance(place, str) or _DEVICE.fullmatch(place) is None:
            raise DamagedFile("the file refers to a storage on an invalid device")
        if not isinstance(name, str | int | None):
            raise DamagedFile("the file refers to a part of a storage by an invalid name")
        if not all(type(value) is int and 0 <= value < 2**63 for value in (n, start, n_stored)):
            raise DamagedFile("the file refers to a storage of impossible size")
        if start + n > n_stored:
            raise DamagedFile("the file refers to a part of a storage that extends past its end")
        name = None if name is None else str(name)
        self.push(StorageRef(str(key), storage_type.dtype, n, start, n_stored, name))
        self._check_meaning(self.stack[-1])

    def _check_meaning(self, ref: StorageRef) -> None:
        """Checks that all uses of a storage agree, and all uses of a part of a storage.

        torch trusts the first use, even if the file drops its value later.
        """
        self.charge(_STORAGE)
        first = self.storages.setdefault(ref.key, ref)
        if first.dtype != ref.dtype or first.n_stored != ref.n_stored:
            raise DamagedFile(f"damaged: storage {ref.key:.80} is used with two types or sizes")
        of_view = ref if ref.view is None else self.storages.setdefault(ref.view, ref)
        if first.view == ref.key or of_view != ref:
            raise DamagedFile(f"damaged: a part of storage {ref.key:.80} is defined in two ways")
