"""`Rollback` on several ranks: all restore the same snapshot, or none does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastguard import CheckpointStore, GuardedOptimizer, Replicated, Rollback, TrainingDivergedError
from guardtest.ranks import Ranks

WAYS = ["ddp", "fsdp"]


class Run:
    def __init__(self, way: str, folder: Path | None, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 7), torch.nn.Linear(7, 2)
        )  # shards of 4 and 3
        if way == "fsdp":
            fully_shard(self.model)
        self.ddp = way == "ddp"
        assert dist.group.WORLD is not None
        group = Replicated(dist.group.WORLD) if self.ddp else None
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.opt = GuardedOptimizer(inner, group=group)
        self.store = None
        if folder is not None:
            self.store = CheckpointStore(folder, group=dist.group.WORLD)
        kwargs = {"every": 2, "after_skips": 2, **kwargs}
        self.rollback = Rollback(self.opt, {"model": self.model}, store=self.store, **kwargs)

    def batch(self, i: int, bad_on: int | None = None) -> Any:
        rank = dist.get_rank()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * i + rank))
        self.opt.zero_grad()
        loss = self.model(x).square().mean() * (math.nan if bad_on == rank else 1.0)
        loss.backward()
        if self.ddp:
            for p in self.model.parameters():
                dist.all_reduce(p.grad)
        self.opt.step()
        return self.rollback.step(position=(rank, i))

    def local(self) -> list[Any]:
        found = [*self.model.parameters()]
        found += [v for state in self.opt.state.values() for v in state.values()]
        return [(t.to_local() if isinstance(t, DTensor) else t).tolist() for t in found]

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def nan_on_one_rank(way: str, folder: Path | None) -> tuple[Any, bool, bool]:
    run = Run(way, folder)
    for i in range(4):
        assert run.batch(i) is None
    at_four = run.local()
    assert run.batch(4, bad_on=1) is None
    rewind = run.batch(5, bad_on=0)
    restored = run.local() == at_four
    for i in (6, 7):
        run.batch(i)
    after = run.local()
    run.close()
    other = Run(way, None)
    for i in (0, 1, 2, 3, 6, 7):
        other.batch(i)
    return (rewind.step, rewind.position, rewind.skip), restored, after == other.local()


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_on_one_rank_rolls_back_all_ranks(
    two: Ranks, tmp_path: Path, way: str, on_disk: bool
) -> None:
    answers = two.run(nan_on_one_rank, way, tmp_path if on_disk else None)
    for rank, (rewind, restored, same_as_without) in enumerate(answers):
        assert rewind == (4, (rank, 3), ((rank, 4), (rank, 5)))
        assert restored and same_as_without


def poisoned(way: str, folder: Path | None) -> tuple[list[int], int, bool]:
    run = Run(way, folder)
    for i in range(4):
        run.batch(i)
    if dist.get_rank() == 1:
        weight = run.model[1].weight.detach()
        (weight.to_local() if isinstance(weight, DTensor) else weight).fill_(math.inf)
    run.rollback.snapshot()
    step = run.rollback.trigger().step
    finite = all(math.isfinite(v) for t in run.local() for v in _flat(t))
    run.close()
    return run.rollback.snapshots, step, finite


def _flat(value: Any) -> list[float]:
    return [v for item in value for v in _flat(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("way", WAYS)
def test_a_snapshot_that_one_rank_finds_bad_is_restored_on_none(
    two: Ranks, tmp_path: Path, way: str, on_disk: bool
) -> None:
    known = 4 if on_disk else 2  # the last snapshot that was checked during the copy
    for snapshots, step, finite in two.run(poisoned, way, tmp_path if on_disk else None):
        assert snapshots[-1] == known and step == known and finite


def hopeless(way: str) -> str:
    run = Run(way, None, keep=1)
    if dist.get_rank() == 0:
        weight = run.model[0].weight.detach()
        (weight.to_local() if isinstance(weight, DTensor) else weight)[0, 0] = math.nan
    run.rollback.snapshot()
    with pytest.raises(TrainingDivergedError) as error:
        run.rollback.trigger()
    return str(error.value)


def test_without_a_finite_snapshot_every_rank_says_which_tensor_is_bad(two: Ranks) -> None:
    for message in two.run(hopeless, "fsdp"):
        assert "no snapshot is finite: step 0: model.0.weight" in message
