"""Reads a pickle without running it: interprets its opcodes but calls nothing.

A pickle is a program: it names globals, calls them, and builds objects. Here names are never looked
up (`inert_calls` provides placeholders) and the work is bounded: every opcode, and every copy that
an opcode asks for, is charged to a budget of memory and time, so that a file of a few kilobytes
cannot take gigabytes or minutes. Some attacks need more than a budget:

* Memo indices: the C unpickler allocates an array as long as the largest index; this memo is a
  dict.
* Hashes of nested tuples, and integers chosen to collide: only plain keys are hashed
  (`inert_values.plain_key`); all others are replaced.
* Decimal digits, which take quadratic time to parse: at most 5,000 are accepted.

Python's own unpickler is four times as fast for a checkpoint, but has no limits.

Source: https://docs.python.org/3/library/pickletools.html, `torch/_weights_only_unpickler.py`.
"""

from __future__ import annotations

import codecs
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.reading.bounded_reader import BoundedReader
from fastguard.checkpoints.reading.inert_calls import Call, call, give_state, meaning
from fastguard.checkpoints.reading.inert_values import (
    InertDict,
    InertFrozenSet,
    InertSet,
    Name,
    StandIn,
    StorageRef,
    StorageType,
    add_items,
    size_of,
)
from fastguard.checkpoints.reading.value_types import check_object
from fastguard.checkpoints.reading.weights_only import OPCODES

# Costs, in the unit of the budget: 3 to 4 ns, or a byte.
_STEP = 100  # an opcode
_MEMO = 100
_TUPLE = 100
_OBJECT = 300  # a list or a dict
_ITEM = 150  # a key and a value
_REPLACED = 700  # a value that another one replaces
_NAME, _NEW_NAME = 200, 1500
_CALL = 900  # a call or a new object, and its result
_VALUE = 3000  # a call that is not one of torch's, whose function is checked
_PARTIAL = 30_000  # a call of an object, which may be a chain of partials
_STORAGE = 1200


class InertUnpickler(BoundedReader):
    """Reads one pickle; see the module docstring.

    Args:
        file: Open for reading, at the start of the pickle; left positioned after its end.
        origin: Byte offset of `file` within the whole file, if it is a part of one.
        spent: See `BoundedReader`.
        has_views: Whether it refers to storages as torch before 1.6 did, which stored views too.
    """

    def __init__(
        self, file: IO[bytes], origin: int = 0, spent: int = 0, *, has_views: bool = False
    ) -> None:
        super().__init__(file, origin, spent)
        self._has_views = has_views
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._names: dict[tuple[str, str], Any] = {}
        self.refused: dict[str, None] = {}  # what `weights_only=True` refuses, except names
        self.storages: dict[str, StorageRef] = {}  # and parts of storages, by their own names

    def load(self) -> Any:
        """Returns the tree that the pickle describes."""
        read, handlers, n_steps = self._file.read, _HANDLERS, 0
        while code := read(1):
            self._budget -= _STEP
            n_steps += 1
            if self._budget < 0:
                raise DamagedFile(
                    f"its pickle seems built to be slow or huge: after {n_steps:,} steps it "
                    "exceeds what a checkpoint needs"
                )
            handler = handlers.get(code)
            if handler is None:
                raise DamagedFile(f"its pickle has an opcode {code!r}, which is not supported here")
            if code == pickle.STOP:
                return self._stack.pop()
            handler(self)
        raise DamagedFile("its pickle ends too soon")

    @property
    def names(self) -> list[str]:
        """Returns the classes and functions that it names, except dtypes and storages."""
        found = (
            value.qualified_name if isinstance(value, Name) else value.name
            for value in self._names.values()
            if isinstance(value, Name | Call)
        )
        return list(dict.fromkeys(found))

    # The stack.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self.charge(_OBJECT)
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _tuple(self, n: int) -> None:
        self.charge(_TUPLE)
        items = tuple(self._stack[-n:]) if n else ()
        if len(items) < n:
            raise IndexError("stack")
        del self._stack[len(self._stack) - n :]
        self._push(items)

    def _made(self, value: Any) -> None:
        self.charge(_OBJECT)
        self._push(value)

    # The memo.

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        if index < 0:
            raise ValueError("negative index")
        self.charge(_MEMO)
        self._memo[index] = self._stack[-1]

    # Numbers and text.

    def _int(self) -> None:
        raw = self._digits()
        self._push({b"00": False, b"01": True}.get(raw, None) if len(raw) == 2 else None)
        if self._stack[-1] is None:
            self._stack[-1] = int(raw, 0)

    def _long_of(self, n: int) -> None:
        self._push(int.from_bytes(self._bytes(n), "little", signed=True))

    def _quoted(self) -> None:
        raw = self._line().strip()
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
            raise ValueError("text without quotes")
        self._python2(codecs.escape_decode(raw[1:-1])[0])  # type: ignore[attr-defined]

    def _python2(self, raw: bytes) -> None:
        """Pushes text of Python 2: UTF-8, as for torch; otherwise Latin-1, for `encoding=`."""
        try:
            self._push(raw.decode())
        except UnicodeDecodeError:
            self.refused["text that is not UTF-8"] = None
            self._push(raw.decode("latin1"))

    # Containers.

    def _append(self, items: list[Any], *, to_set: bool = False) -> None:
        target = self._stack[-1]
        if isinstance(target, list) and isinstance(target, InertSet) == to_set:
            target.extend(items)
        elif isinstance(target, StandIn):
            self.charge(_OBJECT)
            target.parts.append(items)
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            self._add_items(target, items)
        elif isinstance(target, StandIn):
            target.parts.append(self._dict_of(items))
        else:
            raise TypeError(f"keys for a {type(target).__name__}")

    def _dict_of(self, items: list[Any]) -> dict[Any, Any]:
        self.charge(_OBJECT)
        found: dict[Any, Any] = {}
        self._add_items(found, items)
        return found

    def _add_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        self.charge(_STEP + _ITEM * len(items) // 2 + _REPLACED * add_items(target, items))

    def _append_one(self) -> None:
        item = self._stack.pop()
        self._append([item])

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    # Names, calls, objects.

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is not text")
        key = module, name
        self.charge(_NAME)
        if key not in self._names:
            self.charge(_NEW_NAME)
            self._names[key] = meaning(module, name)
        self._push(self._names[key])

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("arguments that are not a tuple")
        self.charge(_CALL + _STEP * len(arguments))
        if not isinstance(function, Call):
            self.charge(_VALUE if isinstance(function, Name) else _PARTIAL)
        if self._budget >= 0:
            self.charge(sum(map(size_of, arguments)))
        if self._budget < 0:
            raise DamagedFile("its pickle copies the same values too many times")
        self._push(call(function, arguments))

    def _new_object(self, arguments: Any, keywords: Any = None) -> None:
        kind = self._stack.pop()
        if not isinstance(kind, Name):
            raise TypeError(f"an object of {type(kind).__name__}")
        check_object(kind)
        self.charge(_CALL)
        parts = [part for part in (arguments, keywords) if part]
        self._push(StandIn(kind.qualified_name, *parts))

    def _instance(self, function: Any, arguments: list[Any]) -> None:
        self._push(function)
        self._push(tuple(arguments))
        self._reduce()

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        self.charge(size_of(state))
        if isinstance(target, StandIn):
            self.charge(_OBJECT)
            target.parts.append(state)
        elif isinstance(target, InertDict):
            target.attributes += (state,)
            self.charge(size_of(target.attributes))
        else:
            give_state(target, state, self.charge)

    def _persistent(self, pid: Any) -> None:
        kind = pid[0] if isinstance(pid, tuple) and pid else None
        if kind == "module":  # source code of a module, in files of torch 0.x
            return self._push(pid[1])
        if kind not in ("storage", b"storage"):
            raise DamagedFile("the file refers to something that is not a torch storage")
        view: Any = None
        if self._has_views:
            *pid, view = pid
        _, storage_type, key, location, n_stored = pid
        name, start, n = (None, 0, n_stored) if view is None else view
        if not isinstance(storage_type, StorageType) or not isinstance(key, str | int):
            raise DamagedFile("the file refers to a storage by an invalid name")
        if not isinstance(location, str | bytes):
            raise DamagedFile("the file refers to a storage on an invalid device")
        if not isinstance(name, str | int | None):
            raise DamagedFile("the file refers to a part of a storage by an invalid name")
        if not all(type(value) is int and 0 <= value < 2**63 for value in (n, start, n_stored)):
            raise DamagedFile("the file refers to a storage of impossible size")
        if start + n > n_stored:
            raise DamagedFile("the file refers to a part of a storage that extends past its end")
        name = None if name is None else str(name)
        self._push(StorageRef(str(key), storage_type.dtype, n, start, n_stored, name))
        self._check_meaning(self._stack[-1])

    def _check_meaning(self, ref: StorageRef) -> None:
        """Checks that all uses of a storage, and of a part of one, agree.

        torch trusts the first one, even if the file drops its value later.
        """
        self.charge(_STORAGE)
        first = self.storages.setdefault(ref.key, ref)
        if first.dtype != ref.dtype or first.n_stored != ref.n_stored:
            raise DamagedFile(f"damaged: storage {ref.key:.80} has two types or sizes")
        of_view = ref if ref.view is None else self.storages.setdefault(ref.view, ref)
        if first.view == ref.key or of_view != ref:
            raise DamagedFile(f"damaged: a part of storage {ref.key:.80} has two meanings")


Handler = Callable[[InertUnpickler], object]


def _reads(form: str, use: Callable[[InertUnpickler, Any], object]) -> Handler:
    """Returns the handler of an opcode with a numeric argument; `form` as in `struct`."""
    number = struct.Struct(form)
    size, unpack = number.size, number.unpack

    def handler(machine: InertUnpickler) -> None:
        use(machine, unpack(machine._file.read(size))[0])

    return handler


def _ignored(_machine: InertUnpickler, _number: Any) -> None:
    pass


def _refused(name: str, handler: Handler) -> Handler:
    """Returns a handler that also notes that `weights_only=True` has no such opcode."""

    def noting(machine: InertUnpickler) -> object:
        machine.refused[f"opcode {name}"] = None
        return handler(machine)

    return noting


M = InertUnpickler
_HANDLERS: dict[bytes, Handler] = {
    pickle.PROTO: _reads("<B", _ignored),
    pickle.FRAME: _reads("<Q", _ignored),
    pickle.STOP: lambda m: None,
    pickle.MARK: M._mark,
    pickle.POP: M._pop,
    pickle.POP_MARK: M._since_mark,
    pickle.DUP: lambda m: m._push(m._stack[-1]),
    # memo
    pickle.GET: lambda m: m._get(int(m._digits())),
    pickle.BINGET: _reads("<B", M._get),
    pickle.LONG_BINGET: _reads("<I", M._get),
    pickle.PUT: lambda m: m._put(int(m._digits())),
    pickle.BINPUT: _reads("<B", M._put),
    pickle.LONG_BINPUT: _reads("<I", M._put),
    pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
    # numbers
    pickle.NONE: lambda m: m._stack.append(None),
    pickle.NEWTRUE: lambda m: m._stack.append(True),
    pickle.NEWFALSE: lambda m: m._stack.append(False),
    pickle.INT: M._int,
    pickle.BININT: _reads("<i", M._push),
    pickle.BININT1: _reads("<B", M._push),
    pickle.BININT2: _reads("<H", M._push),
    pickle.LONG: lambda m: m._push(int(m._digits().removesuffix(b"L"), 0)),
    pickle.LONG1: _reads("<B", M._long_of),
    pickle.LONG4: _reads("<i", M._long_of),
    pickle.FLOAT: lambda m: m._push(float(m._digits())),
    pickle.BINFLOAT: _reads(">d", M._push),
    # text and bytes
    pickle.STRING: M._quoted,
    pickle.BINSTRING: _reads("<i", lambda m, n: m._python2(m._bytes(n))),
    pickle.SHORT_BINSTRING: _reads("<B", lambda m, n: m._python2(m._bytes(n))),
    pickle.UNICODE: lambda m: m._push(m._line().decode("raw-unicode-escape")),
    pickle.BINUNICODE: _reads("<I", lambda m, n: m._push(m._text(n))),
    pickle.SHORT_BINUNICODE: _reads("<B", lambda m, n: m._push(m._text(n))),
    pickle.BINUNICODE8: _reads("<Q", lambda m, n: m._push(m._text(n))),
    pickle.BINBYTES: _reads("<I", lambda m, n: m._push(m._raw(n))),
    pickle.SHORT_BINBYTES: _reads("<B", lambda m, n: m._push(m._raw(n))),
    pickle.BINBYTES8: _reads("<Q", lambda m, n: m._push(m._raw(n))),
    pickle.BYTEARRAY8: _reads("<Q", lambda m, n: m._push(m._raw(n))),
    # containers
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.TUPLE: lambda m: m._made(tuple(m._since_mark())),
    pickle.EMPTY_LIST: lambda m: m._made([]),
    pickle.LIST: lambda m: m._made(m._since_mark()),
    pickle.APPEND: M._append_one,
    pickle.APPENDS: lambda m: m._append(m._since_mark()),
    pickle.EMPTY_SET: lambda m: m._made(InertSet()),
    pickle.ADDITEMS: lambda m: m._append(m._since_mark(), to_set=True),
    pickle.FROZENSET: lambda m: m._made(InertFrozenSet(m._since_mark())),
    pickle.EMPTY_DICT: lambda m: m._made({}),
    pickle.DICT: lambda m: m._push(m._dict_of(m._since_mark())),
    pickle.SETITEM: M._set_one,
    pickle.SETITEMS: lambda m: m._set_items(m._since_mark()),
    # names, calls, objects
    pickle.GLOBAL: lambda m: m._global(m._line().decode(), m._line().decode()),
    pickle.STACK_GLOBAL: lambda m: m._global(*reversed((m._stack.pop(), m._stack.pop()))),
    pickle.REDUCE: M._reduce,
    pickle.BUILD: M._build,
    pickle.INST: lambda m: m._instance(
        meaning(m._line().decode(), m._line().decode()), m._since_mark()
    ),
    pickle.OBJ: lambda m: (lambda items: m._instance(items[0], items[1:]))(m._since_mark()),
    pickle.NEWOBJ: lambda m: m._new_object(m._stack.pop()),
    pickle.NEWOBJ_EX: lambda m: m._new_object(*reversed((m._stack.pop(), m._stack.pop()))),
    pickle.PERSID: lambda m: m._persistent(m._line().decode()),
    pickle.BINPERSID: lambda m: m._persistent(m._stack.pop()),
}
del M
for _code, _handler in _HANDLERS.items():
    if _code not in OPCODES:
        _HANDLERS[_code] = _refused(pickletools.code2op[_code.decode("latin1")].name, _handler)


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a pickle describes.

    Attributes:
        tree: The nested containers.
        names: The classes and functions that it names.
        refused: What else in it `torch.load(weights_only=True)` refuses.
        storages: The first reference to each storage, by name.
        spent: See `BoundedReader`.
    """

    tree: Any
    names: list[str]
    refused: list[str]
    storages: Mapping[str, StorageRef]
    spent: int


def load_inert(file: IO[bytes]) -> Any:
    """Returns the tree that a pickle describes; see `read_pickle`."""
    return read_pickle(file).tree


def read_pickle(
    file: IO[bytes], origin: int = 0, spent: int = 0, *, has_views: bool = False
) -> Pickled:
    """Reads a pickle without executing anything in it.

    Args:
        file: Open for reading, at the start of the pickle; left positioned after its end.
        origin: Byte offset of `file` within the whole file, if it is a part of one.
        spent, has_views: See `InertUnpickler`.

    Raises:
        UnsafeFile: The pickle calls something that is not a value type.
        DamagedFile: The pickle is incomplete, or exceeds the limits.
    """
    try:
        machine = InertUnpickler(file, origin, spent, has_views=has_views)
        tree = machine.load()
    except (CheckpointError, UnsafeFile):
        raise
    except Exception as error:  # arbitrary bytes can raise anything
        raise DamagedFile(f"its pickle cannot be read ({type(error).__name__}: {error})") from None
    return Pickled(tree, machine.names, list(machine.refused), machine.storages, machine.spent)
