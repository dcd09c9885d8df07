"""A model trained on four ranks takes the steps of one process, for any distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import fastguard
from fastguard import GuardedOptimizer, SpikeRule, StepRecord
from fastguard.ranks.groups import Group
from guardtest.ranks import Ranks, collectives

# For this dtype, `fully_shard` divides the gradients itself. For other dtypes, it leaves the mean
# to gloo, which computes the sum in old versions of torch (see
# `fastguard.errors.versions.FSDP_MEANS_ON_CPU`).
MEANS = MixedPrecisionPolicy(reduce_dtype=torch.float64)
STEPS, BATCH, BAD_STEP, BAD_RANK, SPIKE_STEP = 9, 8, 4, 1, 7


class Net(nn.Module):
    """Has named layers, so that each rank can select its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh()) * self.scale


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Returns inputs `(BATCH, 6)` and targets; in one step, far targets cause a spike."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 4, generator=generator)
    return x, y * (1e4 if step == SPIKE_STEP else 1.0)


def sgd(groups: Any) -> Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def adamw(groups: Any) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


def guarded(
    model: nn.Module, group: Group, inner: Callable[[Any], Optimizer] = sgd, **options: Any
) -> GuardedOptimizer:
    """Gives DTensors of different meshes and plain tensors separate param groups."""
    by_mesh: dict[int, list[nn.Parameter]] = {}
    for p in model.parameters():
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        by_mesh.setdefault(id(mesh), []).append(p)
    return GuardedOptimizer(
        inner([{"params": params} for params in by_mesh.values()] or [{"params": []}]),
        max_norm=0.5,
        spike=SpikeRule(window=8, warmup=3),
        named_parameters=model.named_parameters(),
        group=group,
        **options,
    )


def train(
    model: nn.Module,
    opt: GuardedOptimizer,
    part: slice = slice(None),
    bad: Callable[[nn.Module], Tensor | None] = lambda model: None,
    gives_loss: bool = True,
) -> list[StepRecord]:
    """Trains on this rank's part of each batch; `bad` names the tensor to poison at one step."""
    schedule = fastguard.GuardedLR(opt, backoff=0.5, recovery=2)
    for step in range(STEPS):
        x, y = batch_of(step)
        loss = (model(x[part]) - y[part]).square().mean()
        opt.zero_grad()
        loss.backward()
        if step == BAD_STEP and (grad := bad(model)) is not None:
            grad.view(-1)[0] = math.nan
        opt.step(loss=loss if gives_loss else None, tag=step)
        schedule.step()
    return opt.records()


# Ways to distribute the model. Each returns the model of this rank, its part of the batch, and the
# group.

Spread = Callable[[], tuple[nn.Module, slice, Group]]


def my_part() -> slice:
    n = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)


def ddp() -> tuple[nn.Module, slice, Group]:
    return DistributedDataParallel(Net()), my_part(), fastguard.Replicated(dist.group.WORLD)


def fsdp() -> tuple[nn.Module, slice, Group]:
    model = Net()
    fully_shard(model.up, mp_policy=MEANS)
    fully_shard(model, mp_policy=MEANS)
    return model, my_part(), None


def hsdp() -> tuple[nn.Module, slice, Group]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(Net(), mesh=mesh, mp_policy=MEANS), my_part(), None


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel() -> tuple[nn.Module, slice, Group]:
    """A model sharded by columns and by rows, and a plain tensor on all ranks."""
    mesh = init_device_mesh("cpu", (4,))
    return parallelize_module(Net(), mesh, PLAN), slice(None), None


def shards_of_tensor_parallel() -> tuple[nn.Module, slice, Group]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Net(), mesh["tp"], PLAN)
    n, part = BATCH // 2, mesh.get_local_rank("dp")
    return (
        fully_shard(model, mesh=mesh["dp"], mp_policy=MEANS),
        slice(part * n, (part + 1) * n),
        None,
    )


OWNERS = {"up": 0, "down": 1, "scale": 2}  # the fourth rank has no parameters


class Stage(nn.Module):
    """Has only the parameters of its own layer, and computes its inputs itself."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = [Net()]  # in a list, so that these are not its parameters
        for name, owner in OWNERS.items():
            if owner == rank:
                setattr(self, name, getattr(self.net[0], name))

    def forward(self, x: Tensor) -> Tensor:
        for name, p in self.net[0].named_parameters():
            p.grad = None
            with torch.no_grad():
                dist.broadcast(p, OWNERS[name.partition(".")[0]])
        return self.net[0](x)


def pipeline() -> tuple[nn.Module, slice, Group]:
    return Stage(dist.get_rank()), slice(None), dist.group.WORLD


SPREADS = {
    spread.__name__: spread
    for spread in (ddp, fsdp, hsdp, tensor_parallel, shards_of_tensor_parallel, pipeline)
}


# On the ranks.


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}


def spoiled_shard(model: nn.Module) -> Tensor | None:
    """Returns this rank's part of its first non-empty parameter."""
    if dist.get_rank() != BAD_RANK:
        return None
    local = (getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters())
    return next(t for t in local if t.numel())


def on_ranks(name: str, fused: bool) -> tuple[dict[str, Tensor], list[StepRecord], list[Any]]:
    model, part, group = SPREADS[name]()
    opt = guarded(model, group, adamw if fused else sgd)
    last = dist.get_rank() == dist.get_world_size() - 1
    records = train(model, opt, part, spoiled_shard, gives_loss=last or name != "pipeline")
    counts = [opt.applied_steps, opt.skipped_steps, opt.consecutive_skips]
    return weights_of(model), records, [*counts, *(g["lr"] for g in opt.param_groups)]


def alone(fused: bool) -> tuple[dict[str, Tensor], list[StepRecord]]:
    model = Net()
    opt = guarded(model, None, adamw if fused else sgd)
    records = train(model, opt, bad=lambda m: m.up.weight.grad)
    return weights_of(model), records


@pytest.mark.parametrize("fused", [False, True], ids=["sgd", "fused-adamw"])
@pytest.mark.parametrize("name", SPREADS)
def test_the_steps_equal_those_of_one_process(four: Ranks, name: str, fused: bool) -> None:
    weights, expected = alone(fused)
    assert [r.reason for r in expected if r.reason] == ["nonfinite_grad", "grad_spike"]
    results = four.run(on_ranks, name, fused)
    for mine, records, counts in results:
        assert counts[:3] == [STEPS - 2, 2, 0]
        assert len(set(counts[3:])) <= 1 and counts[3] == pytest.approx(expected[-1].lr)
        for ours, theirs in zip(records, expected, strict=True):
            assert (ours.action, ours.reason, ours.tag) == (
                theirs.action,
                theirs.reason,
                theirs.tag,
            )
            assert ours.losses["loss"] == pytest.approx(theirs.losses["loss"], rel=1e-5)
            assert ours.lr == theirs.lr
            # For a bad step, the norm is that of the finite elements.
            if ours.reason != "nonfinite_grad":
                assert ours.total_norm == pytest.approx(theirs.total_norm, rel=1e-5)
                assert ours.clip_coef == pytest.approx(theirs.clip_coef, rel=1e-5)
        for key, weight in mine.items():
            torch.testing.assert_close(weight, weights[key], rtol=1e-4, atol=1e-6)
    for column in zip(*(records for _, records, _ in results), strict=True):
        numbers = {(r.total_norm, r.clip_coef, tuple(r.thresholds.items())) for r in column}
        assert len(numbers) == 1  # bitwise equal on all ranks
        assert (
            len({(r.nan, r.culprit_rank, r.culprit_ranks, *r.losses.values()) for r in column}) == 1
        )


@pytest.mark.parametrize("name", ["fsdp", "tensor_parallel", "pipeline"])
def test_the_rank_that_holds_the_nan_is_named(four: Ranks, name: str) -> None:
    for rank, (_, records, _) in enumerate(four.run(on_ranks, name, False)):
        bad = records[BAD_STEP]
        assert (bad.nan, bad.culprit_rank, bad.culprit_ranks) == (1, BAD_RANK, 1)
        assert bool(bad.culprits) == (rank == BAD_RANK)
        assert ("parameters of another rank" in str(bad)) == (rank != BAD_RANK)
        assert f"on rank {BAD_RANK};" in str(bad)


def collectives_of_a_step(name: str) -> list[list[tuple[str, int]]]:
    model, part, group = SPREADS[name]()
    opt = guarded(model, group)
    seen_in_steps = []
    for step in range(3):
        x, y = batch_of(step)
        loss = (model(x[part]) - y[part]).square().mean()
        opt.zero_grad()
        loss.backward()
        with collectives() as seen:
            opt.step(loss={"loss": loss, "again": loss * 2})
        seen_in_steps.append(seen)
    return seen_in_steps


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "shards_of_tensor_parallel", "pipeline"])
def test_a_step_is_one_collective_of_248_bytes(four: Ranks, name: str) -> None:
    for steps in four.run(collectives_of_a_step, name):
        compared, *others = steps  # the first step begins with a comparison of arguments
        assert compared == [("allreduce_", 208), ("allreduce_", 248)]
        assert others == [[("allreduce_", 248)]] * 2


def group_scope() -> tuple[list[float], dict[str, Tensor]]:
    """Two segments, each with a sharded and a replicated tensor, which count differently."""
    mesh = init_device_mesh("cpu", (4,))
    model = parallelize_module(Net(), mesh, PLAN)
    groups = [
        {"params": list(model.up.parameters()), "max_norm": 0.1},
        {"params": list(model.down.parameters()), "max_norm": 1e-3},
        {"params": [model.scale], "max_norm": 1e6},
    ]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=1.0), clip_scope="group")
    x, y = batch_of(0)
    (model(x) - y).square().mean().backward()
    opt.step()
    return opt.last.clip_coef.tolist(), weights_of(model)


def test_each_param_group_has_its_coefficient(four: Ranks) -> None:
    model = Net()
    groups = [
        {"params": list(model.up.parameters()), "max_norm": 0.1},
        {"params": list(model.down.parameters()), "max_norm": 1e-3},
        {"params": [model.scale], "max_norm": 1e6},
    ]
    opt = GuardedOptimizer(torch.optim.SGD(groups, lr=1.0), clip_scope="group")
    x, y = batch_of(0)
    (model(x) - y).square().mean().backward()
    opt.step()
    for coefs, weights in four.run(group_scope):
        assert coefs == pytest.approx(opt.last.clip_coef.tolist(), rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, weights_of(model)[key], rtol=1e-5, atol=1e-6)
