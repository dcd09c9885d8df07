"""`FlatGradBuckets`: gradients in one buffer per (device, dtype), for any number of tensors.

Every `p.grad` is a view of a buffer, called its slot. Zeroing is one fill, and measuring is one
long read, for any number of tensors. This has two costs: autograd accumulates into `.grad` instead
of storing its own tensor; and a parameter that gets no gradient in a step has a zero gradient, as
with `zero_grad(set_to_none=False)`, unless its `.grad` is None.

Slots start at multiples of 16 bytes. The gaps between them always contain zeros; therefore a
coefficient that is NaN or Inf is applied gradient by gradient, never to a whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from fastguard.errors.versions import grad_dtype_of
from fastguard.functional.clip import clip_buckets
from fastguard.functional.flat_layout import (
    FlatBuffer,
    check_flat,
    first_difference,
    fits,
    grouped_positions,
    has_slot,
    is_movable,
    is_part_of_buffer,
    new_buffer,
    share_of,
)
from fastguard.gradients.buckets import (
    GradBucket,
    GradBuckets,
    Same,
    bucketize,
)
from fastguard.gradients.tensor_kinds import PLAIN, kind_of, watched
from fastguard.gradients.vectors import in_pieces
from fastguard.ranks.plain_shards import check_plain_shards
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure, norm_type_of

WITH_A_GROUP = (
    "FlatGradBuckets does not support a group; use fastguard.clip_grad_norm_(..., group=), or "
    "GuardedOptimizer(..., flat_buckets=True, group=)"
)

_GRAD, _REQUIRES_GRAD = attrgetter("grad"), attrgetter("requires_grad")


class FlatGradBuckets:
    """Moves the gradients of a model into flat buffers and keeps them there.

    Args:
        parameters: Tensors or `(name, tensor)` pairs; tensors that do not require grad are ignored.
        trusted: Whether to skip the check for replaced `.grad` tensors, which takes 0.1 µs per
            tensor. Default: False.
        segments: The segment of each parameter; None: a single segment.
        n_segments: The number of segments. Default: 1.
        fill: Whether gradients that are None become zero immediately. If False, they remain None
            until `zero_`, and it is allowed that no parameter requires grad yet. Default: True.

    Attributes:
        parameters: The parameters with a slot.
        views: The slots of the parameters.
        buffers: The buffers of the slots; a new list each time that slots are laid out.
        in_place: Whether the last `buckets()` found every gradient in its slot; always True if
            `trusted`.

    Raises:
        TypeError: `parameters` is not iterable, or a parameter is sparse, complex or an integer
            tensor.
        ValueError: No parameter requires grad.

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
        """Sets all gradients to zero, by one fill per buffer. Detached gradients are reattached."""
        self._add_lazy()
        if not self.trusted and self._moved():
            self._attach()
        for buffer in self.buffers:
            for piece in in_pieces([buffer.flat]):
                piece.zero_()
        detached, self._detached = self._detached, []
        if self.trusted:
            for p, view in detached:
                p.grad = view
            return
        for p, view in zip(self.parameters, self.views, strict=True):
            grad = p.grad
            if not p.requires_grad:
                p.grad = None  # weight decay changes even frozen parameters that have a gradient
            elif grad is view:
                continue
            elif grad is not None and is_part_of_buffer(grad):
                grad.zero_()
            else:
                p.grad = view if fits(view, p, grad_dtype_of(p)) else None

    def buckets(self) -> GradBuckets:
        """Returns the gradients as buckets for the stages.

        A `.grad` that was replaced is copied into its slot and reattached. A `.grad` that is None
        remains None for this step, with a zero slot, because weight decay must not change a
        parameter that torch would not change. A view of another buffer, such as DDP's, is used in
        place. If a parameter has a gradient for the first time, or has changed its dtype or shape,
        all slots are laid out again.
        """
        self.in_place: bool = False
        if self._kind is PLAIN and watched():  # the tensors were plain when slots were laid out
            return self._current_buckets()
        if self.trusted:
            self._add_lazy()
            self.in_place = True
            return self._buckets
        if self._moved():  # checked first, since this check loads the views into a CPU cache
            self._attach()
        elif all(map(is_, map(_GRAD, self.parameters), self.views)):
            self.in_place = True
            return self._buckets
        elif any(
            p.grad is not None and is_movable(p.grad) and not fits(view, p.grad, p.grad.dtype)
            for p, view in zip(self.parameters, self.views, strict=True)
        ):
            self._attach()
        return self._buckets if self._move_into_slots() else self._current_buckets()

    def replaced(self, turn: int) -> Tensor | None:
        """Checks a share of the parameters, for callers that do not check all of them.

        Args:
            turn: The number of the check; 64 consecutive checks cover all parameters.

        Returns:
            A parameter that was frozen or unfrozen, or whose gradient is not in its slot; None: all
            parameters of the share are unchanged.
        """
        self._add_lazy()
        some = share_of(len(self.parameters), turn)
        parameters, views = self.parameters[some], self.views[some]
        # map and == call no Python code per tensor, so they take a third of the time of a loop.
        if not all(map(is_, map(_GRAD, parameters), views)):
            pairs = zip(parameters, views, strict=True)
            return next(p for p, view in pairs if p.grad is not view)
        if not all(map(_REQUIRES_GRAD, parameters)):
            return next(p for p in parameters if not p.requires_grad)
        if self._kind is PLAIN and self._addresses is not None:
            now, known = list(map(Tensor.data_ptr, views)), self._addresses[some]
            if now != known:
                return parameters[first_difference(now, known)]
        if not self._left_out:
            return None
        rest = self._left_out[share_of(len(self._left_out), turn)]
        return next((p for p in rest if p.grad is not None), None)

    def _current_buckets(self) -> GradBuckets:
        return bucketize(
            [p.grad for p in self.parameters],
            segments=self.segments,
            n_segments=self.n_segments,
            names=self.names,
            device=self._buckets.device,
        )

    @torch.no_grad()
    def _move_into_slots(self) -> bool:
        """Moves gradients into their slots where allowed; returns whether all are in slots."""
        foreign = False
        for p, view in zip(self.parameters, self.views, strict=True):
            grad = p.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            elif is_movable(grad):
                view.copy_(grad)
                p.grad = view
            else:
                foreign = True
        return not foreign

    def detach(self) -> None:
        """Sets gradients that are in their slots to None until `zero_`."""
        pairs = zip(self.parameters, self.views, strict=True)
        self._detached = [(p, view) for p, view in pairs if p.grad is view]
        for p, _ in self._detached:
            p.grad = None

    def release(self) -> None:
        """Gives every gradient its own memory again."""
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is view:
                p.grad = view.clone()

    @torch.no_grad()
    def measure(self, norm_type: float = 2.0) -> GradStats:
        """Measures the gradients, like `fastguard.measure_grads`.

        Args:
            norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.

        Returns:
            The stats of the gradients.

        Raises:
            ValueError: The parameters are shards, which need a group.
        """
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
        """Clips the gradients in place, like `fastguard.clip_grad_norm_`.

        Args:
            max_norm, norm_type, error_if_nonfinite, nonfinite: As in `fastguard.clip_grad_norm_`.

        Returns:
            The norm before clipping, `()`.

        Raises:
            NonFiniteGradError: A gradient is non-finite, in raise mode; this waits for a GPU.
            ValueError: The parameters are shards, which need a group; or an argument is invalid.
        """
        self._check_that_none_is_a_shard()
        buckets = self.buckets()
        return clip_buckets(buckets, max_norm, norm_type, error_if_nonfinite, nonfinite)

    def _check_that_none_is_a_shard(self) -> None:
        """Raises a ValueError for shards; called late, since a guard with a group may use them."""
        check_plain_shards(self.parameters, None, replaced=None, instead=WITH_A_GROUP)

    def _start(self, *, fill: bool) -> None:
        self.in_place = False
        self.views: list[Tensor] = []
        self._half_moved: list[Tensor] = []
        self._detached: list[tuple[Tensor, Tensor]] = []
        self._attach(may_be_empty=not fill)
        if fill:
            self._fill()

    def _fill(self) -> None:
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is None:
                p.grad = view

    def _add_lazy(self) -> None:
        """Gives slots to trusted parameters that were lazy when slots were laid out."""
        if self.trusted and not all(map(is_lazy, self._lazy)):
            self._attach()
            self._fill()

    @torch.no_grad()
    def _attach(self, may_be_empty: bool = True) -> None:
        """Lays out slots for parameters that have or require a gradient; moves gradients in.

        The attributes are set last, so that after an interrupt the next call starts again.
        """
        items, names, segments = self._all_parameters, self._all_names, self._all_segments
        check_flat(items, names)
        chosen = [i for i, p in enumerate(items) if has_slot(p)]
        if not (chosen or may_be_empty or any(map(is_lazy, items))):
            raise ValueError(
                "FlatGradBuckets got no parameter that requires grad; pass model.parameters(), not "
                "their gradients"
            )
        parameters = [items[i] for i in chosen]
        segment_of = [0] * len(chosen) if segments is None else [segments[i] for i in chosen]
        views = [torch.empty(0, device="cpu")] * len(chosen)
        buffers = [
            new_buffer(key, ids, parameters, segment_of, views)
            for key, ids in grouped_positions(parameters).items()
        ]
        self._addresses: list[int] | None = None
        self._half_moved = [*self._half_moved, *self.views, *views]
        mine = set(map(id, self._half_moved))
        for p, view in zip(parameters, views, strict=True):
            if p.grad is not None and (id(p.grad) in mine or is_movable(p.grad)):
                view.copy_(p.grad)
                p.grad = view
        self.parameters: list[Tensor] = parameters
        self.views = views
        self.buffers: list[FlatBuffer] = buffers
        self.names: list[str] | None = None if names is None else [names[i] for i in chosen]
        self.segments: list[int] | None = None if segments is None else segment_of
        self._left_out = [p for p in items if not has_slot(p)]
        self._lazy: list[Tensor] = list(filter(is_lazy, items))
        self._kind = kind_of(set(map(type, views)))
        self._buckets = self._buckets_of_slots()
        self._half_moved = []
        self._addresses = self._addresses_now()

    def _moved(self) -> bool:
        """Whether slots must be laid out again.

        True if the memory of a gradient was replaced (`p.grad.data = ...`, `model.to(...)`), or if
        a parameter has a gradient for the first time.
        """
        if self._addresses is None or self._addresses_now() != self._addresses:
            return True
        return any(p.grad is not None for p in self._left_out)

    def _addresses_now(self) -> list[int]:
        """Returns the addresses of the slots; placeholders have none."""
        return list(map(Tensor.data_ptr, self.views)) if self._kind is PLAIN else []

    def __getstate__(self) -> dict[str, Any]:
        # Slots share memory, which a pickle does not preserve, so a copy creates its own slots.
        kept = ("_all_parameters", "_all_names", "_all_segments", "n_segments", "trusted")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start(fill=self.trusted)

    def _buckets_of_slots(self) -> GradBuckets:
        """Returns buckets over all slots, which are valid until slots are laid out again."""
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
