"""Reading a pickle without running it: stand-ins for classes, references in place of tensors.

A pickle is a program: it names globals, calls them, and builds objects. Here a name is never looked
up. It gives one of three things:

* an entry of `CALLS`, the short list that torch itself writes (and numpy, for scalars and arrays),
  each replaced by a function of this file that only takes notes: a tensor becomes a `TensorRef`;
* a dtype or a storage type of torch;
* for everything else, a stand-in class made on the spot. Creating objects of it, giving them state
  and items works and does nothing. *Calling* it (the REDUCE opcode, which is how a pickle runs
  `os.system`) raises `UnsafeFile` with its name. One call is let pass, because pickled namespaces
  (`ultralytics.utils.IterableSimpleNamespace`) are made by it: no arguments, a CapWord, from
  outside the standard library. It makes a stand-in too.

Source: https://docs.python.org/3/library/pickletools.html, `torch/_weights_only_unpickler.py`.
"""

from __future__ import annotations

import pickle
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile

_DTYPES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}  # torch.float32, ...
_STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}


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


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype | None


class StandIn:
    """An object of a class that is not loaded: what its pickle said of it, and no behaviour."""

    qualified_name: str
    parts: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append({key: value})

    def append(self, item: Any) -> None:
        self.parts.append([item])

    def extend(self, items: Any) -> None:
        self.parts.append(list(items))

    def add(self, item: Any) -> None:
        self.append(item)


class _StandInClass(type):
    """Its instances are the stand-in classes: `__new__` makes an object, a call is refused."""

    qualified_name: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module, _, name = cls.qualified_name.rpartition(".")
        is_class = name.lstrip("_")[:1].isupper() and (
            module.partition(".")[0] not in sys.stdlib_module_names
        )
        if args or kwargs or not is_class:
            raise UnsafeFile(
                f"the file asks to call {cls.qualified_name}, which no checkpoint needs; nothing "
                "was executed. Do not load it unless you trust who wrote it"
            )
        return _new_stand_in(cls)


def _new_stand_in(cls: type, *args: Any, **kwargs: Any) -> StandIn:
    made = object.__new__(cls)
    assert isinstance(made, StandIn)
    object.__setattr__(made, "parts", [args, kwargs] if args or kwargs else [])
    return made


class InertDict(dict):
    """A dict of the file that ignores the attributes given to it (`state_dict._metadata`)."""

    def __setstate__(self, state: Any) -> None:
        pass


class NumpyArray:
    """A pickled ndarray: its values as a tensor if they are plain numbers, else None."""

    values: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        if dtype.plain is not None and isinstance(raw, bytes):
            array = np.frombuffer(raw, dtype.plain).reshape(shape, order="F" if fortran else "C")
            self.values = torch.from_numpy(array.astype(dtype.plain.newbyteorder("=")))


class _NumpyDtype:
    """A pickled `numpy.dtype`; `plain` if it is a number."""

    def __init__(self, code: Any, *_: Any) -> None:
        known = isinstance(code, str) and code[:1] in "biufc" and code[1:] in ("1", "2", "4", "8")
        self.plain: np.dtype | None = np.dtype(code) if known else None

    def __setstate__(self, state: Any) -> None:
        if self.plain is not None and isinstance(state[1], str) and state[1] in "<>=":
            self.plain = self.plain.newbyteorder(state[1])  # type: ignore[arg-type]


def _numpy_scalar(dtype: _NumpyDtype, raw: Any = None) -> Any:
    if dtype.plain is None or not isinstance(raw, bytes):
        return None
    return np.frombuffer(raw, dtype.plain)[0].item()


def _tensor(storage: StorageRef, offset: int, size: Any, stride: Any, *_: Any) -> TensorRef:
    return TensorRef(storage, storage.dtype or torch.uint8, offset, tuple(size), tuple(stride))


def _tensor_of_dtype(
    storage: StorageRef, offset: int, size: Any, stride: Any, _g: Any, _h: Any, dtype: Any, *_: Any
) -> TensorRef:
    return TensorRef(storage, dtype, offset, tuple(size), tuple(stride))


def _tensor_of_subclass(rebuild: Any, _cls: Any, args: tuple, state: Any) -> Attached:
    if not isinstance(rebuild, _Call):
        raise UnsafeFile(f"the file rebuilds a tensor through {rebuild!r}; nothing was executed")
    return Attached(rebuild(*args), state)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _first(value: Any, *_: Any) -> Any:
    return value


def _nothing(*_: Any) -> None:
    return None


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_qtensor": lambda *a: Attached(_tensor(*a[:4]), a[4]),
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": lambda data, _g, _h, state: Attached(data, state),
    "torch._utils._rebuild_sparse_tensor": lambda _layout, data: data,
    "torch._utils._rebuild_nested_tensor": lambda *parts: list(parts),
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_meta_tensor_no_storage": _nothing,
    "torch._utils._rebuild_wrapper_subclass": _nothing,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_subclass,
    "torch.nn.parameter.Parameter": _first,
    "torch.serialization._get_layout": str,
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "collections.OrderedDict": InertDict,
    "collections.Counter": InertDict,
    "collections.defaultdict": lambda _factory=None: InertDict(),
    "builtins.set": list,  # elements may be stand-ins; a list keeps whatever is in it
    "builtins.frozenset": list,
    "builtins.bytearray": lambda *a: _encode(*a) if a and isinstance(a[0], str) else None,
    "builtins.bytes": lambda: b"",
    "builtins.complex": complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": lambda cls, *_: _new_stand_in(cls),
    "pathlib.Path": lambda *parts: "/".join(parts),
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: NumpyArray(),
}
for _name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
    CALLS[f"pathlib.{_name}"] = CALLS["pathlib.Path"]
for _name in ("scalar", "_reconstruct"):  # numpy 2
    CALLS[f"numpy._core.multiarray.{_name}"] = CALLS[f"numpy.core.multiarray.{_name}"]
# Python 3.13 pickles paths by the module that defines them, which no other Python has.
MOVED = {"pathlib._local": "pathlib"}


class _Call:
    """An entry of `CALLS` that a pickle can call but not change."""

    __slots__ = ("__name", "__work")

    def __init__(self, name: str, work: Callable[..., Any]) -> None:
        object.__setattr__(self, "_Call__name", name)
        object.__setattr__(self, "_Call__work", work)

    def __call__(self, *args: Any) -> Any:
        return self.__work(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafeFile(f"the file tries to change {self.__name}; nothing was executed")


class InertUnpickler(pickle.Unpickler):
    """Reads one pickle; see the top of this file."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._classes: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes protocol 2, with the names that Python 2 had
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        module = MOVED.get(module, module)
        qualified = f"{module}.{name}"
        if qualified not in self._classes:
            self._classes[qualified] = self._meaning(module, name, qualified)
        return self._classes[qualified]

    def _meaning(self, module: str, name: str, qualified: str) -> Any:
        if qualified in CALLS:
            return _Call(qualified, CALLS[qualified])
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in ("torch", "torch.cuda", "torch.storage"):
            if name in _STORAGES:
                return _StorageType(_STORAGES[name])
            if name == "UntypedStorage":
                return _StorageType(None)
        body = {"qualified_name": qualified, "__new__": _new_stand_in}
        return _StandInClass(name.rpartition(".")[2], (StandIn,), body)

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[0] if isinstance(pid, tuple) and pid else pid
        if kind == "module":  # the source code of a module, in files of torch 0.x
            return pid[1]
        if kind != "storage":
            raise DamagedFile(f"the file refers to {kind!r}, which is no storage of torch")
        _, storage_type, key, _location, n, *view = pid
        if view and view[0] is not None:
            _view_key, start, n = view[0]
            return StorageRef(str(key), storage_type.dtype, n, start)
        return StorageRef(str(key), storage_type.dtype, n)


def load_inert(file: IO[bytes]) -> Any:
    """The tree that one pickle describes, with nothing of it executed.

    Args:
        file: Open for reading, at the start of the pickle; left behind its end.

    Raises:
        UnsafeFile: It asks to call what is not in `CALLS`.
        DamagedFile: It is not a whole pickle.
    """
    try:
        return InertUnpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever arbitrary bytes do to an unpickler
        raise DamagedFile(f"its pickle cannot be read ({type(error).__name__}: {error})") from None
