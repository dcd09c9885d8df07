"""Reads a pickle without running it: interprets its opcodes but calls nothing.

A pickle is a program: it names globals, calls them, and builds objects. Here names are never looked
up (`inert_calls` provides placeholders) and the work is bounded: every opcode, and every copy that
an opcode asks for, is charged to a budget of memory and time, so that a file of a few kilobytes
cannot take gigabytes or minutes. Some attacks need more than a budget:

* Memo indices: the C unpickler allocates an array as long as the largest index, so this module uses
  a dict.
* Hashes of nested tuples, and integers chosen to collide: only plain keys are hashed
  (`inert_values.plain_key`), and all other keys are replaced.
* Decimal digits, which take quadratic time to parse: at most 5,000 are accepted.

Python's own unpickler is four times as fast for a checkpoint, but has no limits.

Source: https://docs.python.org/3/library/pickletools.html, `torch/_weights_only_unpickler.py`.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.reading.inert_calls import meaning
from fastguard.checkpoints.reading.inert_machine import InertMachine
from fastguard.checkpoints.reading.inert_values import (
    InertFrozenSet,
    InertSet,
    StorageRef,
    hashable,
)
from fastguard.checkpoints.reading.weights_only import OPCODES

Handler = Callable[[InertMachine], object]


def _reads(form: str, use: Callable[[InertMachine, Any], object]) -> Handler:
    """Returns the handler of an opcode with a numeric argument; `form` as in `struct`."""
    number = struct.Struct(form)
    size, unpack = number.size, number.unpack

    def handler(machine: InertMachine) -> None:
        use(machine, unpack(machine.file.read(size))[0])

    return handler


def _ignored(_machine: InertMachine, _number: Any) -> None:
    pass


def _refused(name: str, handler: Handler) -> Handler:
    """Returns a handler that also records that `weights_only=True` refuses the opcode."""

    def noting(machine: InertMachine) -> object:
        machine.refused[f"opcode {name}"] = None
        return handler(machine)

    return noting


M = InertMachine
_HANDLERS: dict[bytes, Handler] = {
    pickle.PROTO: _reads("<B", _ignored),
    pickle.FRAME: _reads("<Q", _ignored),
    pickle.STOP: lambda m: None,
    pickle.MARK: M.mark,
    pickle.POP: M.pop,
    pickle.POP_MARK: M.since_mark,
    pickle.DUP: lambda m: m.push(m.stack[-1]),
    # memo
    pickle.GET: lambda m: m.push_memo(int(m.read_digits())),
    pickle.BINGET: _reads("<B", M.push_memo),
    pickle.LONG_BINGET: _reads("<I", M.push_memo),
    pickle.PUT: lambda m: m.memoize(int(m.read_digits())),
    pickle.BINPUT: _reads("<B", M.memoize),
    pickle.LONG_BINPUT: _reads("<I", M.memoize),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    # numbers
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.INT: M.push_int,
    pickle.BININT: _reads("<i", M.push),
    pickle.BININT1: _reads("<B", M.push),
    pickle.BININT2: _reads("<H", M.push),
    pickle.LONG: lambda m: m.push(int(m.read_digits().removesuffix(b"L"), 0)),
    pickle.LONG1: _reads("<B", M.push_long),
    pickle.LONG4: _reads("<i", M.push_long),
    pickle.FLOAT: lambda m: m.push(float(m.read_digits())),
    pickle.BINFLOAT: _reads(">d", M.push),
    # text and bytes
    pickle.STRING: M.push_quoted,
    pickle.BINSTRING: _reads("<i", lambda m, n: m.push_python2(m.read_bytes(n))),
    pickle.SHORT_BINSTRING: _reads("<B", lambda m, n: m.push_python2(m.read_bytes(n))),
    pickle.UNICODE: lambda m: m.push(m.read_line().decode("raw-unicode-escape")),
    pickle.BINUNICODE: _reads("<I", lambda m, n: m.push(m.read_text(n))),
    pickle.SHORT_BINUNICODE: _reads("<B", lambda m, n: m.push(m.read_text(n))),
    pickle.BINUNICODE8: _reads("<Q", lambda m, n: m.push(m.read_text(n))),
    pickle.BINBYTES: _reads("<I", lambda m, n: m.push(m.read_raw(n))),
    pickle.SHORT_BINBYTES: _reads("<B", lambda m, n: m.push(m.read_raw(n))),
    pickle.BINBYTES8: _reads("<Q", lambda m, n: m.push(m.read_raw(n))),
    pickle.BYTEARRAY8: _reads("<Q", lambda m, n: m.push(m.read_raw(n))),
    # containers
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push_tuple(1),
    pickle.TUPLE2: lambda m: m.push_tuple(2),
    pickle.TUPLE3: lambda m: m.push_tuple(3),
    pickle.TUPLE: lambda m: m.made(tuple(m.since_mark())),
    pickle.EMPTY_LIST: lambda m: m.made([]),
    pickle.LIST: lambda m: m.made(m.since_mark()),
    pickle.APPEND: M.append_one,
    pickle.APPENDS: lambda m: m.append(m.since_mark()),
    pickle.EMPTY_SET: lambda m: m.made(InertSet()),
    pickle.ADDITEMS: lambda m: m.append(m.since_mark(), to_set=True),
    pickle.FROZENSET: lambda m: m.made(InertFrozenSet(hashable(m.since_mark()))),
    pickle.EMPTY_DICT: lambda m: m.made({}),
    pickle.DICT: lambda m: m.push(m.dict_of(m.since_mark())),
    pickle.SETITEM: M.set_one,
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    # names, calls, objects
    pickle.GLOBAL: lambda m: m.push_global(m.read_line().decode(), m.read_line().decode()),
    pickle.STACK_GLOBAL: lambda m: m.push_global(*reversed((m.stack.pop(), m.stack.pop()))),
    pickle.REDUCE: M.reduce,
    pickle.BUILD: M.build,
    pickle.INST: lambda m: m.instance(
        meaning(m.read_line().decode(), m.read_line().decode()), m.since_mark()
    ),
    pickle.OBJ: lambda m: (lambda items: m.instance(items[0], items[1:]))(m.since_mark()),
    pickle.NEWOBJ: lambda m: m.new_object(m.stack.pop()),
    pickle.NEWOBJ_EX: lambda m: m.new_object(*reversed((m.stack.pop(), m.stack.pop()))),
    pickle.PERSID: lambda m: m.persistent(m.read_line().decode()),
    pickle.BINPERSID: lambda m: m.persistent(m.stack.pop()),
}
del M
_NAMES = {code.code.encode("latin1"): code.name for code in pickletools.opcodes}
for _code, _handler in _HANDLERS.items():
    if _code not in OPCODES:
        _HANDLERS[_code] = _refused(_NAMES[_code], _handler)


@dataclass(frozen=True, slots=True)
class Pickled:
    """The contents of a pickle.

    Attributes:
        tree: The nested containers.
        names: The classes and functions that the pickle names.
        refused: Other parts of the pickle that `torch.load(weights_only=True)` refuses.
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
        spent, has_views: See `InertMachine`.

    Raises:
        UnsafeFile: The pickle calls something that is not a value type.
        DamagedFile: The pickle is incomplete, or exceeds the limits.
    """
    try:
        machine = InertMachine(file, origin, spent, has_views=has_views)
        tree = machine.run(_HANDLERS)
    except (CheckpointError, UnsafeFile):
        raise
    except Exception as error:  # arbitrary bytes can raise anything
        raise DamagedFile(f"the pickle cannot be read ({type(error).__name__}: {error})") from None
    return Pickled(tree, machine.names, list(machine.refused), machine.storages, machine.spent)
