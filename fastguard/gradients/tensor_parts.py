"""Splits composite tensors into plain ones: DTensors and subclasses that wrap tensors.

A subclass that wraps tensors, for example a quantized optimizer state, may not support copying. But
if the subclass supports `torch.compile`, `__tensor_flatten__` splits it into plain tensors, and
`__tensor_unflatten__` rebuilds it from these parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastguard.gradients.tensor_kinds import has_numbers


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a composite tensor.

    Attributes:
        tensors: The parts by name: tensors, which may be composite themselves, or other values. A
            DTensor has its local part, under the empty name.
        whole: Rebuilds the tensor from such parts.
    """

    tensors: Mapping[str, Any]
    whole: Callable[[dict[str, Any]], Tensor]

    def of(self, tensors: dict[str, Any]) -> Parts:
        """Returns the same composite tensor with other parts."""
        return Parts(tensors, self.whole)


def parts_of(tensor: Any) -> Parts | None:
    """Returns the parts of a composite tensor, without copying; None for a plain tensor."""
    if hasattr(tensor, "_spec"):
        return _of_dtensor(tensor)
    kind = type(tensor)
    if getattr(tensor, "layout", None) is not torch.strided:  # jagged tensors support copying
        return None
    if not (hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")):
        return None
    names, context = tensor.__tensor_flatten__()
    size, stride = tensor.size(), tensor.stride()
    # Keeps no reference to the tensor, so that a copy does not keep the memory of the original.
    return Parts(
        {name: getattr(tensor, name) for name in names},
        lambda tensors: kind.__tensor_unflatten__(tensors, context, size, stride),
    )


def _of_dtensor(tensor: Any) -> Parts:
    spec = tensor._spec

    def whole(tensors: dict[str, Any]) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            tensors[""],
            spec.mesh,
            spec.placements,
            run_check=False,
            shape=spec.shape,
            stride=spec.stride,
        )

    return Parts({"": tensor.to_local()}, whole)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensor itself if it is plain, else the plain tensors that it consists of."""
    parts = parts_of(tensor)
    if parts is None:
        yield tensor
        return
    for piece in parts.tensors.values():
        if isinstance(piece, Tensor):
            yield from plain_tensors(piece)


def has_plain_type(tensor: Tensor) -> bool:
    """Whether the tensor is not of a subclass that could redefine operations or add attributes."""
    return type(tensor) in (Tensor, Parameter)


def cloned(value: Any) -> Any:
    """Returns a copy of a tensor or another value.

    Raises:
        CannotCopy: The class of the tensor does not support copying.
    """
    parts = parts_of(value)
    if parts is not None:
        return parts.whole({name: cloned(piece) for name, piece in parts.tensors.items()})
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if has_plain_type(value) or value.layout is not torch.strided or not has_numbers(value):
        return value.detach().clone()
    return _cloned_subclass(value)


def _cloned_subclass(value: Tensor) -> Tensor:
    """Copies a tensor by `copy.deepcopy`; if that fails, copies its memory and its attributes."""
    try:
        return copy.deepcopy(value)
    except Exception as error:
        if comes_from_outside(error):
            raise
        if not has_memory(value):
            raise CannotCopy(value, error) from error
    with torch._C.DisableTorchFunctionSubclass():
        made = value.detach().clone().as_subclass(type(value))
    vars(made).update(copy.deepcopy(value.__dict__))
    return made


def has_memory(value: Tensor) -> bool:
    """Whether the tensor has its own memory; a tensor that only wraps others has none."""
    try:
        return value.data_ptr() != 0 or value.numel() == 0
    except RuntimeError:
        return False


def comes_from_outside(error: Exception) -> bool:
    """Whether something other than the copied object caused an error in a copy.

    Either memory ran out, for which torch has no exception class on a CPU, or a signal handler
    raised an exception, such as one for a time limit.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OSError):
        return True
    return "out of memory" in str(error) or "allocate memory" in str(error)


class CannotCopy(TypeError):
    """A tensor, or another object in a state, cannot be copied.

    Attributes:
        value: The object.
    """

    def __init__(self, value: Any, error: BaseException) -> None:
        kind, remedy = type(value).__name__, "remove the object from state_dict()"
        if isinstance(value, Tensor) and not has_plain_type(value):
            remedy = "give the class __tensor_flatten__ and __tensor_unflatten__, or a __deepcopy__"
        elif isinstance(value, Tensor):
            kind = f"{kind} ({value.dtype}, {value.layout}, {value.device})"
        super().__init__(f"a {kind} that cannot be copied ({error!r}); {remedy}")
        self.value = value


def copies_for_deepcopy(state: Any) -> dict[int, Any]:
    """Returns a `memo` for `copy.deepcopy` with copies, by id, of tensors that it cannot copy.

    These are tensors that wrap others, because `deepcopy` would call their `clone`, and
    placeholders. For a placeholder, `deepcopy` would also copy the mode, and then the weak
    references of the mode would be released twice, which corrupts the heap.
    """
    memo: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if not has_numbers(value):
                memo[id(value)] = cloned(value)
                mode = getattr(value, "fake_mode", None)
                memo[id(mode)] = mode
            elif not hasattr(value, "_spec") and parts_of(value) is not None:
                memo[id(value)] = cloned(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif is_dataclass(value):
            for each in fields(value):
                visit(getattr(value, each.name))

    visit(state)
    return memo
