"""Gradients that live in one buffer per (device, dtype), so that their number costs nothing.

Every `p.grad` is a view of the buffer: zeroing is one fill, measuring one long read, whether there
are ten tensors or ten thousand. The price: autograd accumulates into `.grad` instead of handing its
own tensor over, and a parameter that gets no gradient in a step holds a zero one, as with
`zero_grad(set_to_none=False)`, unless its `.grad` is None.

Slots begin at multiples of 16 bytes; what lies between them is zero and stays so: a coefficient
that is not finite multiplies gradient by gradient, never a whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from fastguard.functional.clip import clip_buckets
from fastguard.gradients.buckets import (
    FLOATING,
    GradBucket,
    GradBuckets,
    Run,
    Same,
    bucketize,
    name_of,
)
from fastguard.gradients.cpu_threads import in_pieces
from fastguard.gradients.tensor_kinds import PLAIN, kind_of, watched
from fastguard.ranks.dtensors import is_dtensor
from fastguard.ranks.plain_shards import check_plain_shards
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure, norm_type_of
from fastguard.versions import grad_dtype_of

WITH_A_GROUP = (
    "FlatGradBuckets alone knows no group: use fastguard.clip_grad_norm_(..., group=), or "
    "GuardedOptimizer(..., flat_buckets=True, group=)"
)

_GRAD = attrgetter("grad")
LEAST, TURNS = 16, 64  # parameters per look, looks until all were seen
ALIGN = 16  # bytes; what 128-bit loads and the vectorised optimizer kernels ask for


@dataclass(slots=True)
class FlatBuffer:
    """One buffer: the positions of its parameters in the order of their slots, their segments, and
    its runs, one a segment.
    """

    flat: Tensor
    ids: list[int]
    segments: list[int]
    runs: tuple[Run, ...]


class FlatGradBuckets:
    """Moves the gradients of a model into flat buffers and keeps them there.

    Args:
        parameters: Tensors or `(name, tensor)` pairs; those that need no gradient are left out.
        trusted: Nobody replaces a `.grad` behind our back: skips the check of 0.1 µs a tensor.
        segments: The segment of each parameter; None: one for all.
        n_segments: How many segments there are.
        fill: Whether a gradient that is None becomes zero at once. If not, it stays None until
            `zero_`, and there may be no parameter that needs a gradient so far.

    Attributes:
        parameters: Those that have a slot.
        views: Their slots.
        buffers: The memory of the slots; another list after they were laid out anew.
        in_place: Whether the last `buckets()` found every gradient in its slot, or trusted that.

    Raises:
        TypeError: They cannot be iterated over, or one is sparse, complex or of an integer dtype.
        ValueError: There is no parameter that needs a gradient.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(3, 2)
        >>> flat = fastguard.FlatGradBuckets(model.named_parameters())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> flat.clip_grad_norm_(1.0)
        tensor(2.8284)
        >>> flat.zero_()
        >>> model.weight.grad.abs().sum()
        tensor(0.)
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        trusted: bool = False,
        segments: Sequence[int] | None = None,
        n_segments: int = 1,
        fill: bool = True,
    ) -> None:
        if isinstance(parameters, Module) or not isinstance(parameters, Iterable):
            kind = type(parameters).__name__
            raise TypeError(f"parameters is a {kind}; pass model.named_parameters()")
        items = list(parameters)
        self._all_names: list[str] | None = None
        if items and isinstance(items[0], tuple):
            self._all_names = [name for name, _ in items]  # type: ignore[misc]
            items = [p for _, p in items]
        self._all_parameters: list[Tensor] = items  # type: ignore[assignment]
        self._all_segments = segments
        self.n_segments = n_segments
        self.trusted = trusted
        self._start(fill=fill)

    def zero_(self) -> None:
        """Sets every gradient to zero: one fill a buffer. A detached `.grad` is attached again."""
        if not self.trusted and self._moved():
            self._attach()
        for buffer in self.buffers:
            for piece in in_pieces([buffer.flat]):
                piece.zero_()
        if self.trusted:
            return
        for p, view in zip(self.parameters, self.views, strict=True):
            grad = p.grad
            if not p.requires_grad:
                p.grad = None  # a weight decay would move a frozen parameter that has a gradient
            elif grad is view:
                continue
            elif grad is not None and _is_part_of_a_buffer(grad):
                grad.zero_()
            else:
                p.grad = view if _fits(view, p, grad_dtype_of(p)) else None

    def buckets(self) -> GradBuckets:
        """The gradients as the stages want them.

        A gradient that somebody replaced is copied into its slot and attached again. One that is
        None stays None for this step, its slot zero: a weight decay must not move a parameter that
        torch leaves alone. One that is a view of a buffer of somebody else (DDP's) is used where it
        is. Where a parameter begins to have a gradient, or changes its dtype or shape, all slots
        are laid out anew.
        """
        self.in_place: bool = False
        if self._kind is PLAIN and watched():  # plain when they were laid out
            return self._sorted_anew()
        if self.trusted:
            self.in_place = True
            return self._buckets
        if self._moved():  # first: it brings the views into a cache
            self._attach()
        elif all(map(is_, map(_GRAD, self.parameters), self.views)):
            self.in_place = True
            return self._buckets
        elif any(
            p.grad is not None and _is_movable(p.grad) and not _fits(view, p.grad, p.grad.dtype)
            for p, view in zip(self.parameters, self.views, strict=True)
        ):
            self._attach()
        return self._buckets if self._all_taken_in() else self._sorted_anew()

    def replaced(self, turn: int) -> Tensor | None:
        """Looks at a share of the parameters, for callers that trust the rest.

        Args:
            turn: The number of the look; 64 in a row see every parameter.

        Returns:
            A parameter that was frozen or thawed, or whose gradient is not in its slot any more.
        """
        rest = self._left_out[share_of(len(self._left_out), turn)]
        some = share_of(len(self.parameters), turn)
        parameters, views = self.parameters[some], self.views[some]
        for p, grad, view in zip(parameters, map(_GRAD, parameters), views, strict=True):
            if grad is not view or not p.requires_grad:
                return p
        if self._kind is PLAIN and self._addresses is not None:
            now, then = map(Tensor.data_ptr, views), self._addresses[some]
            for p, address, known in zip(parameters, now, then, strict=True):
                if address != known:
                    return p
        return next((p for p in rest if p.grad is not None), None)

    def _sorted_anew(self) -> GradBuckets:
        return bucketize(
            [p.grad for p in self.parameters],
            segments=self.segments,
            n_segments=self.n_segments,
            names=self.names,
            device=self._buckets.device,
        )

    @torch.no_grad()
    def _all_taken_in(self) -> bool:
        """Whether no gradient stays elsewhere; those that may move go into their slots."""
        foreign = False
        for p, view in zip(self.parameters, self.views, strict=True):
            grad = p.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            elif _is_movable(grad):
                view.copy_(grad)
                p.grad = view
            else:
                foreign = True
        return not foreign

    def release(self) -> None:
        """Gives every gradient memory of its own again, and forgets the buffers' contents."""
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is view:
                p.grad = view.clone()

    @torch.no_grad()
    def measure(self, norm_type: float = 2.0) -> GradStats:
        """As `fastguard.measure_grads`; a ValueError for shards, which ask for a group."""
        self._check_that_none_is_a_shard()
        return measure(self.buckets(), norm_type_of(norm_type))

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        nonfinite: Literal["propagate", "zero", "raise"] = "propagate",
    ) -> Tensor:
        """As `fastguard.clip_grad_norm_`; a ValueError for shards, which ask for a group."""
        self._check_that_none_is_a_shard()
        buckets = self.buckets()
        return clip_buckets(buckets, max_norm, norm_type, error_if_nonfinite, nonfinite)

    def _check_that_none_is_a_shard(self) -> None:
        """Not when they are laid out: a guard with a group may own these buckets."""
        check_plain_shards(self.parameters, None, replaced=None, instead=WITH_A_GROUP)

    def _start(self, *, fill: bool) -> None:
        self.in_place = False
        self.views: list[Tensor] = []
        self._half_moved: list[Tensor] = []
        self._attach(may_be_empty=not fill)
        if not fill:
            return
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is None:
                p.grad = view

    @torch.no_grad()
    def _attach(self, may_be_empty: bool = True) -> None:
        """Lays out slots for all parameters that have or need a gradient; moves gradients in.

        What is here changes last: interrupted, it is done again at the next look.
        """
        items, names, segments = self._all_parameters, self._all_names, self._all_segments
        check_flat(items, names)
        chosen = [i for i, p in enumerate(items) if _has_slot(p)]
        if not (chosen or may_be_empty or any(map(is_lazy, items))):
            raise ValueError(
                "FlatGradBuckets got no parameter that needs a gradient; pass model.parameters(), "
                "not their gradients"
            )
        parameters = [items[i] for i in chosen]
        segment_of = [0] * len(chosen) if segments is None else [segments[i] for i in chosen]
        views = [torch.empty(0)] * len(chosen)
        buffers = [
            _lay_out(key, ids, parameters, segment_of, views)
            for key, ids in _grouped(parameters).items()
        ]
        self._addresses: list[int] | None = None
        self._half_moved = [*self._half_moved, *self.views, *views]
        mine = set(map(id, self._half_moved))
        for p, view in zip(parameters, views, strict=True):
            if p.grad is not None and (id(p.grad) in mine or _is_movable(p.grad)):
                view.copy_(p.grad)
                p.grad = view
        self.parameters: list[Tensor] = parameters
        self.views = views
        self.buffers: list[FlatBuffer] = buffers
        self.names: list[str] | None = None if names is None else [names[i] for i in chosen]
        self.segments: list[int] | None = None if segments is None else segment_of
        self._left_out = [p for p in items if not _has_slot(p)]
        self._kind = kind_of(set(map(type, views)))
        self._buckets = self._whole()
        self._half_moved = []
        self._addresses = self._addresses_now()

    def _moved(self) -> bool:
        """Whether slots are out of date: the memory of a gradient was swapped (`p.grad.data = ...`,
        `model.to(...)`), or a parameter has a gradient for the first time.
        """
        if self._addresses is None or self._addresses_now() != self._addresses:
            return True
        return any(p.grad is not None for p in self._left_out)

    def _addresses_now(self) -> list[int]:
        """Where the slots are; placeholders are nowhere."""
        return list(map(Tensor.data_ptr, self.views)) if self._kind is PLAIN else []

    def __getstate__(self) -> dict[str, Any]:
        # Slots are memory that tensors share, which a pickle does not keep: a copy makes its own.
        kept = ("_all_parameters", "_all_names", "_all_segments", "n_segments", "trusted")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start(fill=self.trusted)

    def _whole(self) -> GradBuckets:
        """Buckets over all slots: they outlive every step, since the slots never move."""
        kind = self._kind
        buckets = tuple(
            GradBucket(
                b.flat.device,
                b.flat.dtype,
                [self.views[i] for i in b.ids],
                b.ids,
                Same(0, len(b.ids)) if self.n_segments == 1 else b.segments,
                b.runs if kind is PLAIN else None,
                kind=kind,
            )
            for b in self.buffers
        )
        first = next(iter((*self.views, *self._all_parameters)), None)
        device = torch.device("cpu") if first is None else first.device
        return GradBuckets(buckets, len(self.parameters), self.n_segments, self.names, device)


def share_of(n: int, turn: int) -> slice:
    """Which of n things are looked at in a turn: at least 16, and all of them in 64 turns."""
    size = max(LEAST, -(-n // TURNS))
    n_shares = max(1, -(-n // size))
    start = turn % n_shares * size
    return slice(start, start + size)


def _grouped(parameters: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    grouped: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(parameters):
        grouped.setdefault((p.device, dtype_of_grad(p)), []).append(i)
    return grouped


def _lay_out(
    key: tuple[torch.device, torch.dtype],
    ids: list[int],
    parameters: Sequence[Tensor],
    segment_of: Sequence[int],
    views: list[Tensor],
) -> FlatBuffer:
    """A buffer for the parameters with these positions, whose slots go into `views`."""
    device, dtype = key
    ids = sorted(ids, key=lambda i: segment_of[i])  # stable: one run a segment
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
    """Raises a TypeError or ValueError for parameters whose gradients have no place in a buffer."""
    seen: set[int] = set()
    for i, p in enumerate(parameters):
        name = name_of(i, names)
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} is a {type(p).__name__}; pass model.parameters()")
        if id(p) in seen:
            raise ValueError(f"{name} appears twice; pass each parameter once")
        seen.add(id(p))
        if not (p.is_leaf or p.retains_grad):  # such as a gradient of create_graph=True
            raise TypeError(
                f"{name} is the result of a computation, which gets no .grad; pass "
                "model.parameters(), not their gradients"
            )
        if is_dtensor(p):
            raise TypeError(
                f"{name} is a DTensor; flat buckets hold plain tensors: guard without them"
            )
        if not p.requires_grad and p.grad is None:
            continue
        if p.layout is not torch.strided or p.dtype not in FLOATING:
            raise TypeError(
                f"{name} is {p.dtype} ({p.layout}); flat buckets hold dense real gradients: "
                "leave this parameter out"
            )
        if p.grad is not None:
            _refuse_sparse(p.grad)


def _has_slot(p: Tensor) -> bool:
    """Whether a parameter has or needs a gradient, and a shape: that of a lazy module comes with
    the first forward pass.
    """
    return not is_lazy(p) and (p.requires_grad or p.grad is not None)


def slot_in(flat: Tensor, start: int, p: Tensor) -> Tensor:
    """The gradient of `p` inside `flat`, with the strides of `p` if these leave no holes: fused
    optimizers ask for the same.
    """
    piece = flat.narrow(0, start, p.numel())
    strides = torch.empty_like(p, device="meta").stride()
    return piece.as_strided(p.shape, strides)


def dtype_of_grad(p: Tensor) -> torch.dtype:
    """The dtype that a gradient of `p` has, or will have."""
    if p.grad is not None:
        return p.grad.dtype
    return grad_dtype_of(p)


def _fits(view: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether a slot can hold a gradient of this dtype, with the shape and device of `like`."""
    return (view.shape, view.dtype, view.device) == (like.shape, dtype, like.device)


def _is_movable(grad: Tensor) -> bool:
    """Whether a gradient belongs to nobody else, and so can move into its slot."""
    _refuse_sparse(grad)
    return not _is_part_of_a_buffer(grad)


def _refuse_sparse(grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"a gradient is sparse ({grad.layout}); flat buckets hold dense gradients: "
            "use sparse=False in the embedding"
        )


def _is_part_of_a_buffer(grad: Tensor) -> bool:
    """Whether a gradient is a dense view of a larger buffer that belongs to somebody else.

    Autograd hands over tensors with a storage of their own; DDP with `gradient_as_bucket_view=True`
    gives views of its buckets, and must find them again.
    """
    if not grad.numel():
        return False
    return grad._is_view() and grad.untyped_storage().nbytes() > grad.numel() * grad.itemsize
