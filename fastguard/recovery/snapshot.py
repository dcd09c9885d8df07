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

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastguard.checkpoints.object_states import state_of
from fastguard.checkpoints.random_state import random_state, set_random_state
from fastguard.gradients.buckets import FLOATING, bucketize
from fastguard.gradients.host_copies import HostCopier, leaves, restored
from fastguard.gradients.tensor_parts import CannotCopy, has_memory, has_plain_type
from fastguard.stages.contract import GradStats
from fastguard.stages.measure import measure

RNG = "rng"
LOOKED = 0.7
"""Share of the host's bytes that is looked at while they are copied. Of 0.6, 0.66, 0.7 and 0.74 it
made two snapshots in turn most alike: 1.26 and 1.27 of a plain copy on two cores.
"""


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
        copier = HostCopier(optimizer, LOOKED if check else 0.0)
        try:
            self._states = copier.copied(states, self._states)
        except CannotCopy as error:
            found = (name for name, leaf in leaves(states, "") if leaf is error.value)
            raise TypeError(f"{next(found, 'the state')} is {error}") from error
        self._copied = copier.events()
        self._finite = frozenset(copier.finite)
        self._states[RNG] = random_state()
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
        for name, leaf in leaves(self._states, ""):
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
            thing.load_state_dict(restored(self._states[name]))
        set_random_state(self._states[RNG])

    def _wait(self) -> None:
        for event in self._copied.values():
            event.synchronize()


def _values(tensor: Tensor) -> Tensor:
    """What of a tensor can be NaN or Inf, in a form that `measure` reads; maybe nothing."""
    if is_lazy(tensor):
        return torch.empty(0)
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    if not has_plain_type(tensor):
        if not has_memory(tensor):  # only its class knows what it holds
            return torch.empty(0)
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.detach().as_subclass(Tensor)
    if tensor.dtype in FLOATING or tensor.is_complex():
        return tensor
    is_fp8 = tensor.is_floating_point() and tensor.dtype is not torch.float4_e2m1fn_x2
    return tensor.float() if is_fp8 else tensor.new_empty(0, dtype=torch.float32)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _measured(named: list[tuple[str, Tensor]]) -> GradStats:
    looked = [(name, v) for name, t in named if (v := _values(t).detach()).numel()]
    return measure(bucketize([v for _, v in looked], names=[name for name, _ in looked]))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, leaf) for name, leaf in leaves(value, path) if isinstance(leaf, Tensor))
