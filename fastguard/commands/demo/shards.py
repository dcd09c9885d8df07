"""The demo on several processes: `torchrun --nproc-per-node 2 -m fastguard demo --fsdp`.

Each process holds a shard of every parameter (FSDP2, gloo, on the CPU) and trains on its part of
each batch. NaN and Inf are injected only in the last process. The other processes learn of them
through the single collective of the guarded step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastguard.commands.usage import UsageError
from fastguard.ranks.dtensors import is_dtensor, local_parts

COMMAND = "torchrun --nproc-per-node 2 -m fastguard demo --fsdp"


@dataclass(frozen=True, slots=True)
class Shards:
    """The rank of this process and the number of processes; by default, there is one process."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def has_faults(self) -> bool:
        """Whether NaN and Inf are injected in this process."""
        return self.rank == self.size - 1

    def shard_(self, model: nn.Module) -> None:
        """Shards every parameter over the processes, in place."""
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        for block in model.get_submodule("blocks").children():
            fully_shard(block)
        fully_shard(model)

    def part(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The part of a batch that this process trains on."""
        inputs, targets = (t.chunk(self.size)[self.rank] for t in batch)
        return inputs, targets

    def mean(self, loss: Tensor) -> float:
        """The loss averaged over the whole batch."""
        total = loss.detach().double()
        if self.size > 1:
            dist.all_reduce(total)
        return total.item() / self.size

    @torch.no_grad()
    def all_finite(self, model: nn.Module) -> bool:
        """Whether every weight of the model is finite, on all processes."""
        bad = torch.zeros(())
        for weight in local_parts(list(model.parameters())):
            bad += not weight.isfinite().all()
        if self.size > 1:
            dist.all_reduce(bad)
        return bad.item() == 0


def norm_as_float(norm: Tensor) -> float:
    """Converts a norm to float; for sharded parameters, sums up partial results first."""
    return (norm.full_tensor() if is_dtensor(norm) else norm).item()


@contextmanager
def processes(sharded: bool, batch_size: int) -> Iterator[Shards]:
    """Yields the processes that `torchrun` started, or this single one.

    Raises:
        UsageError: The command was not started by `torchrun`, or the processes cannot share a batch
            evenly.
    """
    if not sharded:
        yield Shards()
        return
    if not dist.is_available() or "RANK" not in os.environ:
        raise UsageError(f"--fsdp needs several processes; run: {COMMAND}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % size:
        raise UsageError(f"{size} processes cannot share batches of {batch_size}; use 2, 4 or 8")
    dist.init_process_group("gloo")
    try:
        yield Shards(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
