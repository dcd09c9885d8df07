"""A copy of a training state in host memory, to go back to within seconds.

Buffers are made once and reused: the second snapshot costs one plain copy. From a GPU the copy runs
on a stream of its own into pinned memory; the next optimizer step waits for it on the device, the
host does not. What the next forward pass may change (batch statistics, an EMA) is copied in line.
Of DTensors each rank copies its own shard.

Whether it is finite can be asked while it is copied. On a GPU by one more read there; on a CPU by
sums of pieces that the copy left in a cache, which cost 0.35 of a plain copy where a read of its
own costs 0.5. Of the host's own tensors only the share `LOOKED` is looked at that way, the rest
when somebody asks, which is at the next snapshot: two snapshots of 1.25 plain copies stall a run
less than one of 1.0 and one of 1.4. Nobody needs to know it of every copy: see
`snapshot_places.InMemory`.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.buckets import FLOATING, bucketize
from fastguard.checkpoints.object_states import state_of
from fastguard.measure import GradStats, measure

RNG = "rng"
PIECE = 1 << 21
"""Elements that are copied and then found in a cache again."""

LOOKED = 0.7
"""Share of the host's bytes that is looked at while they are copied. Of 0.6, 0.66, 0.7 and 0.74 it
made two snapshots in turn most alike: 1.26 and 1.27 of a plain copy on two cores.
"""


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


class Snapshot:
    """One copy of the state of several objects; `take` overwrites it.

    Attributes:
        step: Number of the optimizer step after which it was taken; None: it holds nothing.
        position: Where the data stood then, as the caller said.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.position: Any = None
        self._states: dict[str, Any] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._seen: GradStats | None = None  # of what lay on a GPU
        self._finite: frozenset[Tensor] = frozenset()  # copies of what did not, seen to be finite

    def take(
        self,
        objects: Mapping[str, Any],
        step: int,
        position: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        check: bool = True,
    ) -> Mapping[torch.device, torch.cuda.Event]:
        """Copies the state of every object and of the random number generators.

        Args:
            objects: By name, anything with `state_dict`.
            step, position: What the attributes become.
            optimizer: What it steps, and its state, stay as they are until its next step.
            check: Look meanwhile whether it is finite: at all that lies on a GPU, and at `LOOKED`
                of the rest. What is not looked at `nonfinite` reads.

        Returns:
            Of each GPU that holds tensors, the event behind which the optimizer may step there.
            Nobody waits here.
        """
        self.step, self._finite = None, frozenset()  # invalid while it is being written
        states = {name: state_of(thing, name) for name, thing in objects.items()}
        on_gpu = [(n, t) for n, t in _tensors(states, "") if _on_gpu(t)] if check else []
        self._seen = _measured(on_gpu) if on_gpu else None
        copier = _Copier(optimizer, LOOKED if check else 0.0)
        self._states = copier.copied(states, self._states)
        self._copied = copier.events()
        self._finite = frozenset(copier.finite)
        self._states[RNG] = rng_state()
        self.step, self.position = step, position
        return self._copied

    def nonfinite(self) -> list[str]:
        """Names of the saved tensors that hold NaN or Inf, and of numbers that are NaN.

        Infinite numbers are fine: `ReduceLROnPlateau` starts with one. Waits for the copy, and
        reads what nobody has looked at.
        """
        self._wait()
        bad, seen = [], frozenset[str]()
        if self._seen is not None:
            bad, seen = self._seen.culprits(), frozenset(self._seen.names or ())
        unknown, numbers = [], []
        for name, leaf in _leaves(self._states, ""):
            if isinstance(leaf, float):
                numbers += [name] if math.isnan(leaf) else []
            elif isinstance(leaf, Tensor) and leaf not in self._finite and name not in seen:
                unknown.append((name, leaf))
        bad = [*bad, *_measured(unknown).culprits()]
        return [name for name, *_ in bad] + numbers

    def restore(self, objects: Mapping[str, Any]) -> None:
        """Loads the saved states, bit for bit, the random number generators too. Waits."""
        self._wait()
        for name, thing in objects.items():
            # A copy: an optimizer may keep the very tensors that it is given.
            thing.load_state_dict(_restored(self._states[name]))
        set_rng_state(self._states[RNG])

    def _wait(self) -> None:
        for event in self._copied.values():
            event.synchronize()


@dataclass(frozen=True, slots=True)
class _Shard:
    """What this rank holds of a DTensor, and what makes it one again."""

    local: Tensor
    of: Any  # the DTensor's spec: mesh, placements, shape and strides

    def whole(self, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            self.of.mesh,
            self.of.placements,
            run_check=False,
            shape=self.of.shape,
            stride=self.of.stride,
        )


class _Copier:
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
        if isinstance(value, Tensor):
            return self._copied_tensor(value, into)
        if isinstance(value, Mapping):
            old = into if isinstance(into, Mapping) else {}
            return _like(value, {k: self.copied(v, old.get(k)) for k, v in value.items()})
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            old = into if isinstance(into, list | tuple) and len(into) == len(value) else ()
            padded = [*old, *[None] * (len(value) - len(old))]
            return type(value)(self.copied(v, o) for v, o in zip(value, padded, strict=True))
        return copy.deepcopy(value)

    def _copied_tensor(self, value: Tensor, into: Any) -> Any:
        if hasattr(value, "_spec"):
            before = into.local if isinstance(into, _Shard) else None
            local = value.to_local()  # type: ignore[attr-defined]
            return _Shard(self._copied_tensor(local, before), value._spec)  # type: ignore[attr-defined]
        if value.layout is not torch.strided:  # as many elements as it has today
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
    found += [v for state in optimizer.state.values() for v in state.values()]
    local = (getattr(t, "_local_tensor", t) for t in found if isinstance(t, Tensor))
    return frozenset(t.data_ptr() for t in local)


def _restored(value: Any) -> Any:
    """A copy of a saved state as the object gave it."""
    if isinstance(value, _Shard):
        return value.whole(value.local.clone())
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return _like(value, {k: _restored(v) for k, v in value.items()})
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_restored(v) for v in value)
    return copy.deepcopy(value)


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
        made._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
    return made


def _values(tensor: Tensor) -> Tensor:
    """What of a tensor can be NaN or Inf, in a form that `measure` reads; maybe nothing."""
    if tensor.layout is not torch.strided:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.dtype in FLOATING or tensor.is_complex():
        return tensor
    is_fp8 = tensor.is_floating_point() and tensor.dtype is not torch.float4_e2m1fn_x2
    return tensor.float() if is_fp8 else tensor.new_empty(0, dtype=torch.float32)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _measured(named: list[tuple[str, Tensor]]) -> GradStats:
    looked = [(name, v) for name, t in named if (v := _values(t.detach())).numel()]
    return measure(bucketize([v for _, v in looked], names=[name for name, _ in looked]))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, leaf) for name, leaf in _leaves(value, path) if isinstance(leaf, Tensor))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What nested states hold, by name; of a DTensor what this rank has."""
    if isinstance(value, _Shard):
        value = value.local
    elif hasattr(value, "_spec"):
        value = value.to_local()
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
