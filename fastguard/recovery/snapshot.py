"""A copy of a training state in host memory, which can be restored within seconds.

Buffers are allocated once and reused, so that every snapshot after the first costs one plain copy.
From a GPU the copy runs on its own stream into pinned memory; the next optimizer step waits for the
copy on the device, not on the host. State that the next forward pass may change (batch statistics,
an EMA) is copied on the current stream. With DTensors, each rank copies its own shard.

A copy can be checked for NaN and Inf while it is made. Tensors on a GPU are read once more on the
GPU. Tensors on the host are summed piece by piece while the copied piece is in cache, which takes
0.35 times as long as a plain copy; a separate read would take 0.5 times as long. Only the share
`CHECKED_SHARE` of the tensors on the host is checked during the copy, and the rest at the next
snapshot, which needs the result. Two snapshots that each cost 1.25 plain copies disturb a run less
than one that costs 1.0 and one that costs 1.4. Not every copy is checked: see
`snapshot_stores.InMemory`.
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
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure

RNG = "rng"
CHECKED_SHARE = 0.7
"""Share of the bytes of host tensors that is checked during the copy. Among 0.6, 0.66, 0.7 and
0.74, this value makes the costs of two successive snapshots most similar: 1.26 and 1.27 plain
copies on two cores.
"""


class Snapshot:
    """One copy of the state of several objects; `take` overwrites it.

    Attributes:
        step: The optimizer step after which the snapshot was taken; None: the snapshot is empty.
        position: The data position at that step, as given by the caller.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.position: Any = None
        self._states: dict[str, Any] = {}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._gpu_stats: GradStats | None = None  # statistics of the tensors on a GPU
        # Copies of host tensors that are known to be finite.
        self._finite: frozenset[Tensor] = frozenset()

    def take(
        self,
        objects: Mapping[str, Any],
        step: int,
        position: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        check: bool = True,
    ) -> Mapping[torch.device, torch.cuda.Event]:
        """Copies the state of every object and of the random number generators. Never blocks.

        Args:
            objects: Objects with `state_dict`, by name.
            step, position: Values for the attributes.
            optimizer: The optimizer whose parameters and state do not change until its next step.
            check: Whether to check for NaN and Inf during the copy: all tensors on a GPU, and
                `CHECKED_SHARE` of all others. `nonfinite` checks the rest. Default: True.

        Returns:
            For each GPU with tensors, the event that the optimizer's next step must wait for.
        """
        self.step, self._finite = None, frozenset()  # invalid until the copy is complete
        states = {name: state_of(thing, name) for name, thing in objects.items()}
        on_gpu = [(n, t) for n, t in _tensors(states, "") if _on_gpu(t)] if check else []
        self._gpu_stats = _measured(on_gpu) if on_gpu else None
        copier = HostCopier(optimizer, CHECKED_SHARE if check else 0.0)
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
        """Returns the names of saved tensors with NaN or Inf, and of saved numbers that are NaN.

        Infinite numbers are allowed, since `ReduceLROnPlateau` starts with one. Waits for the copy,
        and checks what was not checked before.
        """
        self._wait()
        bad, seen = [], frozenset[str]()
        if self._gpu_stats is not None:
            bad, seen = self._gpu_stats.culprits(), frozenset(self._gpu_stats.names or ())
        unknown, numbers = [], []
        for name, leaf in leaves(self._states, ""):
            if isinstance(leaf, float):
                numbers += [name] if math.isnan(leaf) else []
            elif isinstance(leaf, Tensor) and leaf not in self._finite and name not in seen:
                unknown.append((name, leaf))
        bad = [*bad, *_measured(unknown).culprits()]
        return [name for name, *_ in bad] + numbers

    def restore(self, objects: Mapping[str, Any]) -> None:
        """Waits for the copy, then loads the saved states, including random number generators."""
        self._wait()
        for name, thing in objects.items():
            # Passes a copy, since an optimizer may keep the tensors that it loads.
            thing.load_state_dict(restored(self._states[name]))
        set_random_state(self._states[RNG])

    def _wait(self) -> None:
        for event in self._copied.values():
            event.synchronize()


def _values(tensor: Tensor) -> Tensor:
    """Returns a tensor that `measure` can read, which is finite if the given tensor is."""
    if is_lazy(tensor):
        return torch.empty(0, device="cpu")
    if tensor.layout is not torch.strided or tensor.is_nested:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    if not has_plain_type(tensor):
        if not has_memory(tensor):  # subclasses without storage cannot be read
            return torch.empty(0, device="cpu")
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
