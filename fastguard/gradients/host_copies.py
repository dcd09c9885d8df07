"""Copies of nested states in host memory, made into the buffers of an earlier copy.

Tensors become plain ones in pinned memory, those made of others become `Parts`; everything else is
copied by `copy.deepcopy`. Copied from a GPU on a stream of its own, and on a CPU looked at for NaN
and Inf while a piece of it is in a cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.buckets import FLOATING
from fastguard.gradients.tensor_parts import (
    CannotCopy,
    Parts,
    cloned,
    has_plain_type,
    parts_of,
    plain_tensors,
)

PIECE = 1 << 21
"""Elements that are copied and then found in a cache again."""


class HostCopier:
    """Copies nested states to the host, into the buffers of an earlier copy where they fit.

    Args:
        optimizer: What it steps, and its state, stay as they are until the next step: from a GPU
            these are copied on a stream of its own. Everything else is copied in line.
        looked: The share of the host's bytes that is looked at, from 0 to 1.

    Attributes:
        finite: The copies, of tensors of the host, that were seen to be finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, looked: float) -> None:
        self._optimizer = optimizer
        self._looked = looked
        self._bytes = self._bytes_looked_at = 0
        self.finite: set[Tensor] = set()  # by identity, as tensors hash
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copied(self, value: Any, into: Any) -> Any:
        """The copy.

        Args:
            value: A nested state.
            into: An earlier copy of it, which is overwritten; None without one.

        Raises:
            CannotCopy: Something in it takes no copies.
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
        except (CannotCopy, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a class has ways of its own to refuse
            raise CannotCopy(value, error) from error

    def _copied_tensor(self, value: Tensor, into: Any) -> Any:
        parts = parts_of(value)
        if parts is not None:
            old = into.tensors if isinstance(into, Parts) else {}
            return parts.of({n: self.copied(t, old.get(n)) for n, t in parts.tensors.items()})
        is_plain = has_plain_type(value) or value.layout is not torch.strided
        return self._copied_plain(value, into) if is_plain else cloned(value)

    def _copied_plain(self, value: Tensor, into: Any) -> Tensor:
        if value.layout is not torch.strided or value.is_nested:  # as many elements as today
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
        if value.dtype not in FLOATING or not self._is_next(value.nbytes):
            return into.copy_(value)
        pieces = [(value, into)]
        if value.numel() > PIECE and value.is_contiguous() and into.is_contiguous():
            pieces = list(zip(*(t.view(-1).split(PIECE) for t in (value, into)), strict=True))
        is_finite = True
        for source, made in pieces:
            made.copy_(source)
            # NaN and Inf stay in a sum. One that overflows makes a second look, and no harm.
            is_finite = is_finite and math.isfinite(source.sum())
        if is_finite:
            self.finite.add(into)
        return into

    def _is_next(self, n_bytes: int) -> bool:
        """Whether this tensor is one of those that are looked at, which lie between the others."""
        self._bytes += n_bytes
        if self._bytes_looked_at >= self._looked * self._bytes:
            return False
        self._bytes_looked_at += n_bytes
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
        """By device, an event behind all that was copied from it, also in line."""
        events = {}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            events[device] = torch.cuda.Event()
            events[device].record(stream)
        return events


def _addresses(optimizer: torch.optim.Optimizer | None) -> frozenset[int]:
    """Where the parameters of an optimizer lie, and its state."""
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
    """A copy of a saved state as the object gave it."""
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
    """A dict of the same kind, with what Module.state_dict adds to it.

    `MultiStepLR` keeps its milestones in a Counter, and asks it for what no dict knows.
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
    """What nested states hold, by name; of a DTensor what this rank has."""
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
