"""Returns the local parts of DTensors, which the stages measure, and reduces partial DTensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_local_of = attrgetter("_local_tensor")  # `to_local` takes 10 µs per tensor, because of autograd


def imported_class(module: str, name: str) -> type | None:
    """Returns a class of torch; None if it has not been imported, and so has no instances.

    Another thread may be in the middle of importing the module, which then lacks the class.
    """
    return getattr(sys.modules.get(module), name, None)


def dtensor_types(kinds: Iterable[type]) -> tuple[type, ...]:
    """Returns the DTensor types among the given types. Never imports DTensor."""
    dtensor = imported_class("torch.distributed.tensor", "DTensor")
    if dtensor is None:
        return ()
    return tuple(kind for kind in kinds if issubclass(kind, dtensor))


def is_dtensor(t: Any) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor."""
    return bool(dtensor_types((type(t),)))


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each tensor, or the tensor itself, without copying."""
    known = dtensor_types(set(map(type, tensors)))
    parts = [_local_of(t) if type(t) in known else t for t in tensors]
    if set(map(type, parts)) <= {Tensor, torch.nn.Parameter}:
        return parts
    unfinished = imported_class(
        "torch.distributed._functional_collectives", "AsyncCollectiveTensor"
    )
    if unfinished is None:
        return parts
    return [t.wait() if isinstance(t, unfinished) else t for t in parts]  # type: ignore[attr-defined]


def is_partial(t: Tensor) -> bool:
    """Whether the ranks hold summands of the tensor, which have not been added yet."""
    return is_dtensor(t) and any(p.is_partial() for p in t.placements)


def whole(t: Tensor, like: Tensor | None = None) -> Tensor:
    """Reduces a partial tensor over its ranks, with one collective; returns others unchanged.

    Args:
        t: Any tensor.
        like: A DTensor, such as the parameter whose gradient is `t`. If it is on the same mesh and
            not partial, the result gets its placements; otherwise partial dimensions become
            replicated. Default: None.
    """
    if not is_partial(t):
        return t
    from torch.distributed.tensor import Replicate

    assert is_dtensor(t)
    if is_dtensor(like) and like.device_mesh == t.device_mesh and not is_partial(like):
        return t.redistribute(placements=like.placements)
    return t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])


def make_whole_(parameters: Iterable[Tensor]) -> None:
    """Replaces every partial gradient with the reduced gradient, with one collective each."""
    for p in parameters:
        grad = p.grad
        if grad is not None and is_partial(grad):
            p.grad = whole(grad, p)
