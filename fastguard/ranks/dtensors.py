"""DTensors: their local parts, which the stages measure, and partial ones made whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_local_of = attrgetter("_local_tensor")  # to_local() costs 10 µs a tensor, for autograd


def dtensor_types(kinds: Iterable[type]) -> tuple[type, ...]:
    """Those of some types that are DTensor. Imports nothing: without DTensor there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return ()
    return tuple(kind for kind in kinds if issubclass(kind, module.DTensor))


def is_dtensor(t: Any) -> TypeGuard[DTensor]:
    return bool(dtensor_types((type(t),)))


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor, itself or the local part of a DTensor; no copy."""
    known = dtensor_types(set(map(type, tensors)))
    parts = [_local_of(t) if type(t) in known else t for t in tensors]
    functional = sys.modules.get("torch.distributed._functional_collectives")
    if functional is None or set(map(type, parts)) <= {Tensor, torch.nn.Parameter}:
        return parts
    unfinished = functional.AsyncCollectiveTensor
    return [t.wait() if isinstance(t, unfinished) else t for t in parts]  # type: ignore[attr-defined]


def is_partial(t: Tensor) -> bool:
    """Whether the ranks hold summands of a tensor instead of its elements."""
    return is_dtensor(t) and any(p.is_partial() for p in t.placements)


def whole(t: Tensor, like: Tensor | None = None) -> Tensor:
    """A partial tensor summed up over its ranks: one collective. Others come back as they are.

    Args:
        t: Any tensor.
        like: A DTensor whose placements the result takes if it lies on the same mesh (a gradient
            takes those of its parameter); else what was partial is replicated.
    """
    if not is_partial(t):
        return t
    from torch.distributed.tensor import Replicate

    assert is_dtensor(t)
    if is_dtensor(like) and like.device_mesh == t.device_mesh and not is_partial(like):
        return t.redistribute(placements=like.placements)
    return t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])


def make_whole_(parameters: Iterable[Tensor]) -> None:
    """Sums up every partial gradient in its place: one collective each."""
    for p in parameters:
        grad = p.grad
        if grad is not None and is_partial(grad):
            p.grad = whole(grad, p)
