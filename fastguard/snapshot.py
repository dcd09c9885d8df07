"""A copy of a training state in host memory, to go back to within seconds.

Buffers are made once and reused: the second snapshot costs one plain copy. From a GPU the copy runs
on a stream of its own into pinned memory; the next optimizer step waits for it on the device, the
host does not.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.buckets import FLOATING, bucketize
from fastguard.measure import measure

RNG = "rng"


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
        self._copied: torch.cuda.Event | None = None

    def take(self, objects: Mapping[str, Any], step: int, position: Any) -> torch.cuda.Event | None:
        """Copies the state of every object and of the random number generators.

        Returns:
            For tensors on a GPU, the event behind which the state may change. Nobody waits here.
        """
        self.step = None  # invalid while it is being written
        states = {name: thing.state_dict() for name, thing in objects.items()}
        stream = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._states = _copied(states, self._states)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        else:
            self._states = _copied(states, self._states)
        self._states[RNG] = rng_state()
        self.step, self.position = step, position
        return self._copied

    def nonfinite(self) -> list[str]:
        """Names of the saved tensors that hold NaN or Inf. Waits for the copy."""
        self._wait()
        named = [
            (name, t) for name, t in _tensors(self._states, "") if t.dtype in FLOATING and t.numel()
        ]
        names = [name for name, _ in named]
        stats = measure(bucketize([t for _, t in named], names=names))
        return [name for name, *_ in stats.culprits()]

    def restore(self, objects: Mapping[str, Any]) -> None:
        """Loads the saved states, bit for bit, the random number generators too. Waits."""
        self._wait()
        for name, thing in objects.items():
            # A copy: an optimizer may keep the very tensors that it is given.
            thing.load_state_dict(_copied(self._states[name], None))
        set_rng_state(self._states[RNG])

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


def _copied(value: Any, into: Any) -> Any:
    """A copy on the host, into the buffers of an earlier copy where they fit."""
    if isinstance(value, Tensor):
        fits = isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype
        if not fits:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, Mapping):
        old = into if isinstance(into, Mapping) else {}
        copied = OrderedDict() if isinstance(value, OrderedDict) else {}
        copied.update((k, _copied(v, old.get(k))) for k, v in value.items())
        if hasattr(value, "_metadata"):  # what Module.state_dict adds
            copied._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]
        return copied
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        old = into if isinstance(into, list | tuple) and len(into) == len(value) else ()
        padded = [*old, *[None] * (len(value) - len(old))]
        return type(value)(_copied(v, o) for v, o in zip(value, padded, strict=True))
    return copy.deepcopy(value)


def _tensors(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(path, value)]
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return [found for k, v in items for found in _tensors(v, f"{path}.{k}" if path else str(k))]
