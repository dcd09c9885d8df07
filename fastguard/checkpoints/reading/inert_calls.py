"""Placeholders for the names and calls in a pickle. Nothing is looked up and nothing runs.

A name becomes one of three things:

* An entry of `CALLS`, the short list of functions that torch writes (and numpy, for scalars and
  arrays). Each is replaced with a function of this package that only records its arguments: a
  tensor becomes a `TensorRef`.
* A dtype or a storage type of torch.
* Otherwise a `Name`. Opcodes that create an object of this name, with state and items, make a
  `StandIn`.

*Calling* a `Name` (the REDUCE opcode, with which a pickle runs `os.system`) also makes a `StandIn`
if the name denotes a value type: an enum, a `datetime`, a `partial`, or a class from any package.
If the name denotes a function, or a class of the standard library that does more than hold values,
`UnsafeFile` is raised. Nothing is executed in either case; the error warns that other readers would
make the call.
"""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

import torch

from fastguard.checkpoints.errors import DamagedFile, UnsafeFile
from fastguard.checkpoints.reading.inert_values import (
    Attached,
    InertDict,
    InertFrozenSet,
    InertSet,
    InertText,
    LongText,
    Name,
    StandIn,
    StorageRef,
    StorageType,
    TensorRef,
    hashable,
    kind_of,
)
from fastguard.checkpoints.reading.pickled_arrays import (
    NumpyArray,
    NumpyDtype,
    array_from_buffer,
    numpy_scalar,
    python_array,
)
from fastguard.checkpoints.reading.value_types import attribute, check_call

_DTYPES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}  # torch.float32, ...
_STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
_MAX_DIMENSIONS = 64  # the limit of torch's own loops over elements


class Call:
    """An entry of `CALLS`, which a pickle can call but not modify."""

    __slots__ = ("name", "work")

    def __init__(self, name: str, work: Callable[..., Any]) -> None:
        self.name: str = name
        self.work: Callable[..., Any] = work

    def __repr__(self) -> str:
        return self.name


def meaning(module: str, name: str) -> Any:
    """Returns the placeholder for a name in a pickle."""
    # torch.save writes protocol 2, which uses the names of Python 2
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    module = MOVED.get(module, module)
    qualified = f"{module}.{name}"
    if qualified in CALLS:
        return Call(qualified, CALLS[qualified])
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.cuda", "torch.storage"):
        if name in _STORAGES:
            return StorageType(_STORAGES[name])
        if name == "UntypedStorage":
            return StorageType(None)
    return Name(qualified)


def call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Returns the placeholder for the result of a call, without making the call.

    Raises:
        UnsafeFile: The function does not belong to a value type.
    """
    if isinstance(function, Call):
        return function.work(*arguments)
    name = check_call(function, arguments)
    return StandIn(name, *([arguments] if arguments else []))


def give_state(target: Any, state: Any, charge: Callable[[int], None]) -> None:
    """Handles the BUILD opcode for targets that are neither a `StandIn` nor a dict.

    Raises:
        UnsafeFile: The opcode would modify a name or a call.
    """
    if isinstance(target, NumpyArray | NumpyDtype):
        target.set_state(state, charge)
        return
    raise UnsafeFile(f"the file tries to change {kind_of(target)}; nothing was executed")


def _dimensions(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(v) is int for v in values):
        raise DamagedFile("damaged: a shape that is not a tuple of integers")
    if len(values) > _MAX_DIMENSIONS:
        raise DamagedFile(
            f"a tensor of {len(values):,} dimensions; torch supports at most {_MAX_DIMENSIONS}"
        )
    if not all(-(2**63) <= v < 2**63 for v in values):
        raise DamagedFile("damaged: a shape larger than any memory")
    return tuple(values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> TensorRef:
    return _view(storage, offset, size, stride, None)


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, _hooks: Any, _metadata: Any = None
) -> TensorRef:
    return _view(storage, offset, size, stride, None, grad)


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any,
    _hooks: Any,
    dtype: Any,
    _metadata: Any = None,
) -> TensorRef:
    return _view(storage, offset, size, stride, dtype, grad)


def _view(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, requires_grad: Any = False
) -> TensorRef:
    if not isinstance(storage, StorageRef) or type(offset) is not int:
        raise DamagedFile("damaged: a tensor without storage")
    dtype = dtype or storage.dtype or torch.uint8
    if not isinstance(dtype, torch.dtype):
        raise DamagedFile("damaged: a tensor without dtype")
    if not isinstance(requires_grad, bool):
        raise DamagedFile("damaged: a tensor whose requires_grad is not a bool")
    size, stride = _dimensions(size), _dimensions(stride)
    if len(size) != len(stride):
        raise DamagedFile(f"damaged: a tensor with {len(size)} sizes and {len(stride)} strides")
    return TensorRef(storage, dtype, offset, size, stride)


def _quantized(
    storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, grad: Any, _hooks: Any
) -> Any:
    """Returns the integers of a quantized tensor and the scale that multiplies them.

    A scale of NaN or Inf makes every element non-finite. A per-tensor scale is a Python float; it
    is stored as an array of one element, so that it is checked in the same way as per-channel
    scales.
    """
    if not isinstance(quantizer, tuple) or len(quantizer) < 3:
        raise DamagedFile("damaged: a quantized tensor without its scale")
    scale, zero_point = quantizer[1], quantizer[2]
    if isinstance(scale, int | float):
        scale = python_array("d", (scale,))
    state = {"scale": scale, "zero_point": zero_point}
    return Attached(_view(storage, offset, size, stride, None, grad), state)


def _tensor_of_subclass(rebuild: Any, _cls: Any, args: Any, state: Any) -> Attached:
    if not isinstance(rebuild, Call) or not isinstance(args, tuple):
        raise UnsafeFile(f"the file rebuilds a tensor by {kind_of(rebuild)}; nothing was executed")
    return Attached(rebuild.work(*args), state)


def _encode(text: Any, encoding: str = "latin1", *_: Any) -> Any:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise DamagedFile(f"damaged: bytes stored as text in {encoding!r:.40}")
    if isinstance(text, LongText):
        return text.encoded(encoding)
    return text.encode(encoding)


def _bytearray(*arguments: Any) -> Any:
    if arguments and isinstance(arguments[0], str | LongText):
        return _encode(*arguments)
    return arguments[0] if arguments and isinstance(arguments[0], bytes) else b""


def _joined(separator: str, empty: str = "") -> Callable[..., InertText]:
    """Returns a function that joins the parts of a path or device; limits the length.

    Args:
        separator: Text between the parts.
        empty: The value of no parts; "": they are an error.
    """

    def join(*parts: Any) -> InertText:
        if not parts and empty:
            return InertText(empty)
        if not parts or not all(isinstance(part, str | int) for part in parts):
            raise DamagedFile("damaged: a path or device that is not text")
        text = separator.join(str(part) for part in parts)
        if len(text) > 4096:
            raise DamagedFile(
                f"a path or device of {len(text):,} characters, too long for a checkpoint"
            )
        return InertText(text)

    return join


def _first(value: Any, *_: Any) -> Any:
    return value


def _parameter(data: Any, _requires_grad: Any, _hooks: Any, state: Any = None) -> Any:
    is_object = isinstance(data, StandIn) and data.qualified_name != "builtins.complex"
    if not is_object and not isinstance(data, TensorRef | Attached | NumpyArray):
        raise DamagedFile(f"damaged: a parameter made from {kind_of(data)}")
    return data if state is None else Attached(data, state)


def _without_data(*_: Any) -> StandIn:
    return StandIn("torch.Tensor")


def _layout(name: Any) -> InertText:
    if not isinstance(name, str):
        raise DamagedFile("damaged: a layout that is not text")
    return InertText(name)


def _list(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


def _dict(items: Any = (), *_: Any) -> InertDict:
    """Builds a dict from a dict or from pairs, as Python 2 pickled an OrderedDict."""
    if isinstance(items, dict):
        return InertDict(items)
    pairs = list(items)
    if not all(isinstance(p, list | tuple) and len(p) == 2 and type(p[0]) is str for p in pairs):
        raise DamagedFile("damaged: a dict made from something other than pairs")
    return InertDict(pairs)


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": lambda _layout, data: data,
    "torch._utils._rebuild_nested_tensor": lambda *parts: list(parts),
    "torch.nested._internal.nested_tensor._rebuild_njt": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._utils._rebuild_hpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_data,
    "torch._utils._rebuild_wrapper_subclass": _without_data,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_subclass,
    "torch.nn.parameter.Parameter": _first,
    "torch.serialization._get_layout": _layout,
    "torch.Size": lambda sizes=(): _dimensions(sizes),
    "torch.device": _joined(":"),
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None, items=(): _dict(items),
    "collections.deque": _list,
    "builtins.getattr": attribute,
    "builtins.set": lambda items=(): InertSet(hashable(items)),
    "builtins.frozenset": lambda items=(): InertFrozenSet(hashable(items)),
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _bytearray,
    "builtins.complex": lambda *parts: StandIn("builtins.complex", *parts),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": lambda cls, *_: _object_of(cls),
    "array.array": python_array,
    "array._array_reconstructor": lambda _cls, _code, form, raw: python_array(form, raw),
    "pathlib.Path": _joined("/", "."),
    "numpy.dtype": NumpyDtype,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: NumpyArray(),
    "numpy.core.numeric._frombuffer": array_from_buffer,
    "numpy.ma.core._mareconstruct": lambda *_: NumpyArray(is_masked=True),
}
for _name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
    CALLS[f"pathlib.{_name}"] = CALLS["pathlib.Path"]
for _name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer"):  # numpy 2
    CALLS[f"numpy._core.{_name}"] = CALLS[f"numpy.core.{_name}"]
# Python 3.13 pickles paths under the module `pathlib._local`, which only that version has.
MOVED = {"pathlib._local": "pathlib"}


def _object_of(kind: Any) -> StandIn:
    if not isinstance(kind, Name):
        raise DamagedFile("damaged: an object of something that is not a class")
    return StandIn(kind.qualified_name)
