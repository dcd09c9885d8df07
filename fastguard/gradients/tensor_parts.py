"""Tensors that are made of others: DTensors, and subclasses that wrap tensors, as quantised states.

Such a subclass need not know how to be copied. What it can do, so that `torch.compile` takes it, is
tell its plain tensors and be made of such again: `__tensor_flatten__`, `__tensor_unflatten__`.
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
    """A tensor that is made of others, in pieces.

    Attributes:
        tensors: The pieces by name: tensors, which may be made of others themselves, or values; of
            a DTensor what this rank holds, under the empty name.
        whole: Makes one of such pieces.
    """

    tensors: Mapping[str, Any]
    whole: Callable[[dict[str, Any]], Tensor]

    def of(self, tensors: dict[str, Any]) -> Parts:
        """The same with other pieces."""
        return Parts(tensors, self.whole)


def parts_of(tensor: Any) -> Parts | None:
    """The pieces of a tensor that is made of others, not copied; None: it is a plain one."""
    if hasattr(tensor, "_spec"):
        return _of_dtensor(tensor)
    kind = type(tensor)
    if getattr(tensor, "layout", None) is not torch.strided:  # jagged ones copy themselves
        return None
    if not (hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")):
        return None
    names, context = tensor.__tensor_flatten__()
    size, stride = tensor.size(), tensor.stride()
    # No reference to the tensor: its memory would stay for as long as a copy of it does.
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
    """The tensor itself, or the plain ones that it is made of."""
    parts = parts_of(tensor)
    if parts is None:
        yield tensor
        return
    for piece in parts.tensors.values():
        if isinstance(piece, Tensor):
            yield from plain_tensors(piece)


def has_plain_type(tensor: Tensor) -> bool:
    """Whether it is of no subclass that may change what operations do, or carry attributes."""
    return type(tensor) in (Tensor, Parameter)


def cloned(value: Any) -> Any:
    """A copy with memory of its own.

    Raises:
        CannotCopy: It is a tensor of a class that takes no copies.
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
    """A copy as its class makes it, or else of its memory and its attributes."""
    try:
        return copy.deepcopy(value)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not has_memory(value):
            raise CannotCopy(value, error) from error
    with torch._C.DisableTorchFunctionSubclass():
        made = value.detach().clone().as_subclass(type(value))
    vars(made).update(copy.deepcopy(value.__dict__))
    return made


def has_memory(value: Tensor) -> bool:
    """Whether its elements lie where its address says; a class that wraps others has none."""
    try:
        return value.data_ptr() != 0 or value.numel() == 0
    except RuntimeError:
        return False


class CannotCopy(TypeError):
    """A tensor, or something else in a state, that takes no copies.

    Attributes:
        value: It.
    """

    def __init__(self, value: Any, error: BaseException) -> None:
        kind, remedy = type(value).__name__, "keep it out of state_dict()"
        if isinstance(value, Tensor) and not has_plain_type(value):
            remedy = "give the class __tensor_flatten__ and __tensor_unflatten__, or a __deepcopy__"
        elif isinstance(value, Tensor):
            kind = f"{kind} ({value.dtype}, {value.layout}, {value.device})"
        super().__init__(f"a {kind} that cannot be copied ({error!r}); {remedy}")
        self.value = value


def copies_for_deepcopy(state: Any) -> dict[int, Any]:
    """Copies, by the id of the original, of nested tensors that wrap others, and of placeholders.

    As the `memo` of `copy.deepcopy`, which asks the former for their `clone`. Of a placeholder it
    would copy the mode too, and with it weak references, which are then released twice: the heap
    is corrupt from there on.
    """
    memo: dict[int, Any] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            if not has_numbers(value):
                memo[id(value)] = cloned(value)
                mode = getattr(value, "fake_mode", None)
                memo[id(mode)] = mode
            elif not hasattr(value, "_spec") and parts_of(value) is not None:
                memo[id(value)] = cloned(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                look(item)
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif is_dataclass(value):
            for each in fields(value):
                look(getattr(value, each.name))

    look(state)
    return memo
