"""Copies nested states to host memory, reusing the buffers of an earlier copy.

Plain tensors become tensors in host memory (pinned for copies from a GPU), composite tensors become
`Parts`, and everything else is copied by `copy.deepcopy`. Copies from a GPU can run on a separate
stream. Copies on a CPU can check each piece for NaN and Inf while the piece is in a cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastguard.gradients.buckets import FLOATING
from fastguard.gradients.tensor_parts import (
    CannotCopy,
    Parts,
    cloned,
    comes_from_outside,
    has_plain_type,
    parts_of,
    plain_tensors,
)

PIECE = 1 << 21
"""Number of elements that are copied at a time, few enough to stay in a cache."""


class HostCopier:
    """Copies nested states to the host, into the buffers of an earlier copy if they fit.

    Args:
        optimizer: An optimizer. Its parameters and state do not change until its next step, so on a
            GPU they are copied on a separate stream. All other tensors are copied on the current
            stream.
        checked_share: The share of the bytes of host tensors to check for NaN and Inf, from 0 to 1.

    Attributes:
        finite: The copies of host tensors that are known to be finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, checked_share: float) -> None:
        self._optimizer = optimizer
        self._checked_share = checked_share
        self._bytes = self._checked_bytes = 0
        # contains tensors by identity, since tensors hash by identity
        self.finite: set[Tensor] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copied(self, value: Any, into: Any) -> Any:
        """Copies a value.

        Args:
            value: A nested state.
            into: An earlier copy to overwrite; None: there is no earlier copy.

        Raises:
            CannotCopy: A part of the value cannot be copied.
        """
        if isinstance(value, Mapping):
            old = into if isinstance(into, Mapping) else {}
            return _like(value, {k: self.copied(v, old.get(k)) for k, v in value.items()})
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            old = into if isinstance(into, list | tuple) and len(into) == len(value) else ()
            padded = [*old, *[None] * (len(value) - len(old))]
            return type(value)(self.copied(v, o) for v, o in zip(value, padded, strict=True))
        try:
            return (
                self._copied_tensor(value, into) if isinstance(value, Tensor) else deepcopy(value)
            )
        except Exception as error:  # a class may raise any error
            if isinstance(error, CannotCopy) or comes_from_outside(error):
                raise
            raise CannotCopy(value, error) from error

    def _copied_tensor(self, value: Tensor, into: Any) -> Any:
        parts = parts_of(value)
        if parts is not None:
            old = into.tensors if isinstance(into, Parts) else {}
            return parts.of({n: self.copied(t, old.get(n)) for n, t in parts.tensors.items()})
        is_plain = has_plain_type(value) or value.layout is not torch.strided
        if not is_plain:
            return cloned(value)
        if value.is_leaf and (value.requires_grad or type(value) is Parameter):
            old = into.tensors.get("") if isinstance(into, Parts) else None
            return Parts({"": self._copied_plain(value, old)}, _trained(value))
        return self._copied_plain(value, into)

    def _copied_plain(self, value: Tensor, into: Any) -> Tensor:
        # Sparse and nested tensors get no buffer, since their number of elements may vary.
        if value.layout is not torch.strided or value.is_nested:
            return value.detach().to("cpu", copy=True)
        fits = isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype
        if not fits:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        if not value.is_cuda:
            return self._copied_here(value.detach(), into)
        stream = self._stream_of(value.device)
        with torch.cuda.stream(stream) if value.data_ptr() in self._unchanged else nullcontext():
            return into.copy_(value.detach(), non_blocking=True)

    def _copied_here(self, value: Tensor, into: Tensor) -> Tensor:
        if value.dtype not in FLOATING or not self._is_to_be_checked(value.nbytes):
            return into.copy_(value)
        pieces = [(value, into)]
        if value.numel() > PIECE and value.is_contiguous() and into.is_contiguous():
            pieces = list(zip(*(t.view(-1).split(PIECE) for t in (value, into)), strict=True))
        is_finite = True
        for source, made in pieces:
            made.copy_(source)
            # A sum with NaN or Inf is not finite. If a sum of finite elements overflows, the only
            # consequence is a second check of the tensor.
            is_finite = is_finite and math.isfinite(source.sum())
        if is_finite:
            self.finite.add(into)
        return into

    def _is_to_be_checked(self, n_bytes: int) -> bool:
        """Whether to check this tensor, so that the share of checked bytes stays as requested."""
        self._bytes += n_bytes
        if self._checked_bytes >= self._checked_share * self._bytes:
            return False
        self._checked_bytes += n_bytes
        return True

    @cached_property
    def _unchanged(self) -> frozenset[int]:
        return _addresses(self._optimizer)

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            stream = self._streams[device] = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def events(self) -> dict[torch.device, torch.cuda.Event]:
        """Returns, for each device, an event that marks the end of all copies from it."""
        events = {}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            events[device] = torch.cuda.Event()
            events[device].record(stream)
        return events


def _trained(value: Tensor) -> Callable[[dict[str, Any]], Tensor]:
    """Returns what makes a trained tensor or a `Parameter` like `value` from copied values."""
    requires_grad, is_parameter = value.requires_grad, type(value) is Parameter

    def whole(tensors: dict[str, Any]) -> Tensor:
        made = tensors[""]
        return Parameter(made, requires_grad) if is_parameter else made.requires_grad_()

    return whole


def check_copyable(value: Any, path: str) -> None:
    """Raises a TypeError that names the first value in a nested state that cannot be copied.

    Plain tensors and numbers, which can always be copied, are not touched.
    """
    copier = HostCopier(None, 0.0)
    for name, leaf in leaves(value, path):
        if isinstance(leaf, Tensor) and has_plain_type(leaf) and not leaf.is_meta:
            continue
        if not isinstance(leaf, int | float | str | NoneType):
            try:
                copier.copied(leaf, None)
            except CannotCopy as error:
                raise TypeError(f"{name} is {error}") from error


def _addresses(optimizer: torch.optim.Optimizer | None) -> frozenset[int]:
    """Returns the addresses of an optimizer's parameters and state."""
    if optimizer is None:
        return frozenset()
    found = [p for group in optimizer.param_groups for p in group["params"]]
    found += [
        v
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for v in state.values()
    ]
    tensors = (t for t in found if isinstance(t, Tensor))
    return frozenset(t.data_ptr() for tensor in tensors for t in plain_tensors(tensor))


def restored(value: Any) -> Any:
    """Returns a copy of a saved state in its original form."""
    if isinstance(value, Parts):
        return value.whole({name: restored(piece) for name, piece in value.tensors.items()})
    if isinstance(value, Tensor):
        return cloned(value)
    if isinstance(value, Mapping):
        return _like(value, {k: restored(v) for k, v in value.items()})
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(restored(v) for v in value)
    return deepcopy(value)


def _like(value: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a dict of the same class and attributes, with these items.

    The class matters because `MultiStepLR` uses methods of the Counter in which it keeps its
    milestones. The attributes matter because `Module.state_dict` adds `_metadata`.
    """
    if not isinstance(value, dict):
        return items
    made = copy.copy(value)
    made.clear()
    made.update(items)
    if hasattr(value, "_metadata"):
        made._metadata = deepcopy(value._metadata)  # type: ignore[attr-defined]
    return made


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields `(name, leaf)` of nested states; for a DTensor, the local part."""
    parts = value if isinstance(value, Parts) else parts_of(value)
    if parts is not None:
        for name, piece in parts.tensors.items():
            yield from leaves(piece, f"{path}.{name}" if name else path)
        return
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key))
