"""The layout of flat gradient buffers: slots, buffers, and checks of what can be in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastguard.errors.versions import grad_dtype_of
from fastguard.gradients.buckets import FLOATING, Run, name_of
from fastguard.gradients.tensor_kinds import is_wrapped
from fastguard.ranks.dtensors import is_dtensor

ALIGN = 16  # bytes, as needed for 128-bit loads and vectorized optimizer kernels
# minimum number of parameters per turn; number of turns that cover all parameters
SMALLEST_SHARE, TURNS = 16, 64


@dataclass(slots=True)
class FlatBuffer:
    """One gradient buffer.

    Attributes:
        flat: The memory.
        ids: Positions of the parameters, in the order of their slots.
        segments: The segment of each parameter.
        runs: The parts of `flat`, one per segment.
    """

    flat: Tensor
    ids: list[int]
    segments: list[int]
    runs: tuple[Run, ...]


def grouped_positions(
    parameters: Sequence[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Returns the positions of parameters by device and dtype of their gradients."""
    grouped: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(parameters):
        grouped.setdefault((p.device, dtype_of_grad(p)), []).append(i)
    return grouped


def new_buffer(
    key: tuple[torch.device, torch.dtype],
    ids: list[int],
    parameters: Sequence[Tensor],
    segment_of: Sequence[int],
    views: list[Tensor],
) -> FlatBuffer:
    """Creates the buffer for the parameters with these positions; stores slots in `views`."""
    device, dtype = key
    ids = sorted(ids, key=lambda i: segment_of[i])  # a stable sort, which gives one run per segment
    unit = ALIGN // dtype.itemsize
    starts, at = [], 0
    for i in ids:
        starts.append(at)
        at += -(-parameters[i].numel() // unit) * unit
    flat = torch.zeros(at, dtype=dtype, device=device)
    bounds: dict[int, tuple[int, int]] = {}
    for i, start, stop in zip(ids, starts, [*starts[1:], at], strict=True):
        views[i] = slot_in(flat, start, parameters[i])
        first, _ = bounds.get(segment_of[i], (start, stop))
        bounds[segment_of[i]] = (first, stop)
    runs = tuple(Run(flat.narrow(0, a, b - a), segment) for segment, (a, b) in bounds.items())
    return FlatBuffer(flat, ids, [segment_of[i] for i in ids], runs)


def check_flat(parameters: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raises a TypeError or ValueError for parameters whose gradients cannot be in a buffer."""
    seen: set[int] = set()
    for i, p in enumerate(parameters):
        name = name_of(i, names)
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} is a {type(p).__name__}; pass model.parameters()")
        if id(p) in seen:
            raise ValueError(f"{name} appears twice; pass each parameter once")
        seen.add(id(p))
        if not (p.is_leaf or p.retains_grad):  # for example, a gradient of create_graph=True
            raise TypeError(
                f"{name} is the result of a computation, which gets no .grad; pass "
                "model.parameters(), not their gradients"
            )
        if is_dtensor(p):
            raise TypeError(
                f"{name} is a DTensor, but flat buckets support only plain tensors; use "
                "GuardedOptimizer without flat buckets"
            )
        if not p.requires_grad and p.grad is None:
            continue
        if p.layout is not torch.strided or p.dtype not in FLOATING:
            raise TypeError(
                f"{name} is {p.dtype} ({p.layout}), but flat buckets support only dense real "
                "gradients; leave this parameter out"
            )
        if p.grad is not None:
            _refuse_odd(p.grad)
        elif is_wrapped(p):
            raise TypeError(
                f"{name} is a {type(p).__name__}, whose gradient may wrap several tensors, but "
                f"flat buckets support only plain tensors; {_LEAVE_OUT}"
            )


def has_slot(p: Tensor) -> bool:
    """Whether a parameter has or requires a gradient, and a shape, unlike a lazy parameter."""
    return not is_lazy(p) and (p.requires_grad or p.grad is not None)


def slot_in(flat: Tensor, start: int, p: Tensor) -> Tensor:
    """Returns the slot for the gradient of `p` in `flat`.

    The slot has the strides of `p` if these leave no gaps, as fused optimizers require.
    """
    piece = flat.narrow(0, start, p.numel())
    strides = torch.empty_like(p, device="meta").stride()
    return piece.as_strided(p.shape, strides)


def dtype_of_grad(p: Tensor) -> torch.dtype:
    """Returns the dtype that the gradient of `p` has or will have."""
    if p.grad is not None:
        return p.grad.dtype
    return grad_dtype_of(p)


def fits(view: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether a slot can hold a gradient of this dtype, with the shape and device of `like`."""
    return (view.shape, view.dtype, view.device) == (like.shape, dtype, like.device)


def is_movable(grad: Tensor) -> bool:
    """Whether a gradient can move into its slot.

    A part of another buffer cannot move; nor can a gradient with a graph (`create_graph=True`),
    which optimizers such as AdaHessian differentiate in their step.
    """
    _refuse_odd(grad)
    return not grad.requires_grad and not is_part_of_buffer(grad)


_LEAVE_OUT = "do not use flat buckets, or leave this parameter out"


def _refuse_odd(grad: Tensor) -> None:
    """Raises a TypeError for a gradient that is sparse, or that wraps other tensors."""
    if is_wrapped(grad):
        raise TypeError(
            f"a gradient is a {type(grad).__name__}, which wraps other tensors, but flat buckets "
            f"hold only plain gradients; {_LEAVE_OUT}"
        )
    if grad.layout is not torch.strided:
        raise TypeError(
            f"a gradient is sparse ({grad.layout}), but flat buckets hold only dense gradients; "
            "use sparse=False in the embedding"
        )


def is_part_of_buffer(grad: Tensor) -> bool:
    """Whether a gradient is a dense view of a larger buffer of another owner.

    Autograd creates tensors with their own storage; DDP with `gradient_as_bucket_view=True` uses
    views of its buckets, which must stay in place.
    """
    if not grad.numel():
        return False
    return grad._is_view() and grad.untyped_storage().nbytes() > grad.numel() * grad.itemsize


def share_of(n: int, turn: int) -> slice:
    """Returns which of n parameters (at least 16) to check in a turn; 64 turns cover all."""
    size = max(SMALLEST_SHARE, -(-n // TURNS))
    n_shares = max(1, -(-n // size))
    start = turn % n_shares * size
    return slice(start, start + size)


def first_difference(now: Sequence[int], then: Sequence[int]) -> int:
    """Returns the first position at which two sequences of equal length differ."""
    return next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b)
