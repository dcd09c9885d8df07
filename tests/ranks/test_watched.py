"""`GuardedOptimizer(watch=...)` over ranks: reads, collectives, and norms of shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastguard import GuardedOptimizer, RankWatch
from fastguard.stages.cpu import stages as cpu
from guardtest.rank_guards import net, replicated, same_on_all
from guardtest.ranks import Ranks, collectives


def watched_by_default() -> list[set[str]]:
    """Returns the quantities that each step reads without `watch_every`."""
    model = DistributedDataParallel(net())
    options = replicated(watch=("replica_drift", "tensor_norms"), watch_every=None)
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        opt.step()
    return [set(record.watch) for record in opt.records()]


def test_drift_is_read_in_every_step_by_default_and_norms_in_every_100th(four: Ranks) -> None:
    drift = {"replica_drift"}
    norms = {"tensor_norms", "zero_share"}
    assert same_on_all(four.run(watched_by_default)) == [drift | norms, drift, drift]


def bytes_of_steps() -> list[list[tuple[str, int]]]:
    model = DistributedDataParallel(net())
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        **replicated(watch=("tensor_norms", "replica_drift", "noise_scale"), watch_every=2),
    )
    RankWatch(opt, model)
    seen_in_steps = []
    for _ in range(4):
        model(torch.ones(2, 6)).sum().backward()
        with collectives() as seen:
            opt.step()
        seen_in_steps.append(seen)
    return seen_in_steps


def test_a_watched_step_sends_more_numbers_in_the_same_collective(four: Ranks) -> None:
    """Drift needs 12 numbers, the noise scale one, and norms of plain tensors none."""
    watched, other = [("allreduce_", 248 + 8 * 13)], [("allreduce_", 248)]
    for steps in four.run(bytes_of_steps):
        assert steps == [[("allreduce_", 208), *watched], other, watched, other]


def bytes_of_shards(*watch: str) -> list[int]:
    """Returns the sizes of the collectives of a step with shards of four tensors."""
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = GuardedOptimizer(inner, watch=watch, watch_every=1)
    sizes: list[int] = []
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        with collectives() as seen:
            opt.step()
        sizes = [size for name, size in seen if name == "allreduce_"]
    return sizes


def test_watched_shards_send_16_bytes_per_tensor_and_2_kb_for_exponents(four: Ranks) -> None:
    [plain] = same_on_all(four.run(bytes_of_shards))
    assert same_on_all(four.run(bytes_of_shards, "tensor_norms")) == [plain + 16 * 4]
    assert same_on_all(four.run(bytes_of_shards, "underflow")) == [plain + 8 * 257]


def reads() -> list[int]:
    """Returns the number of buckets whose bits each step has read."""
    counts: list[int] = []
    model = DistributedDataParallel(net())
    options = replicated(watch=("replica_drift", "tensor_norms"), watch_every=None)
    opt = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
    actual = cpu.read_bits

    def counted(*given: Any) -> Tensor:
        counts[-1] += 1
        return actual(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "read_bits", counted)
        for _ in range(2):
            counts.append(0)
            model(torch.ones(4, 6)).square().mean().backward()
            opt.step()
    return counts


def test_norms_and_drift_read_the_gradients_once(four: Ranks) -> None:
    """The second read is for the weights."""
    assert same_on_all(four.run(reads)) == [2, 2]


# Shards.


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (4,))
    shard = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    said = []
    for parameter, options in (
        (shard, {"watch": ("replica_drift",)}),
        (nn.Parameter(torch.ones(2)), {"watch": ("replica_drift",), "group": dist.group.WORLD}),
        (nn.Parameter(torch.ones(2)), replicated(watch=("noise_scale",), norm_type=1.0)),
    ):
        try:
            GuardedOptimizer(torch.optim.SGD([parameter], lr=0.1), **options)
        except ValueError as error:
            said.append(str(error))
    return said


def test_settings_that_ranks_cannot_compare_are_an_error(four: Ranks) -> None:
    dtensors, distinct, p_norm = same_on_all(four.run(refusals))
    assert "some parameters are DTensors; remove 'replica_drift' from watch" in dtensors
    assert "hold different tensors; pass group=fastguard.Replicated" in distinct
    assert "norm_type=1; use norm_type=2.0" in p_norm


def sharded_norms() -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the recorded norms of a sharded model with a plain parameter, and the true norms."""
    model = net()
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    mesh = init_device_mesh("cpu", (4,))
    fully_shard(model, mesh=mesh)
    extra = nn.Parameter(torch.ones(3))
    named = [*model.named_parameters(), ("extra", extra)]
    opt = GuardedOptimizer(
        torch.optim.SGD([{"params": [p]} for _, p in named], lr=0.1),
        named_parameters=named,
        watch=("tensor_norms", "underflow"),
    )
    model(torch.ones(2, 6)).square().sum().backward()
    extra.grad = torch.tensor([0.0, 3.0, 4.0])
    grads = {name: p.grad for name, p in named}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    opt.step()
    norms = {name: torch.linalg.vector_norm(g).item() for name, g in whole.items()}
    return opt.flush()[0].watch, norms


def test_norms_of_shards_equal_those_of_the_whole_tensors(four: Ranks) -> None:
    told, norms = same_on_all(four.run(sharded_norms))
    assert told["tensor_norms"] == pytest.approx(norms, rel=1e-6)
    assert told["zero_share"]["extra"] == pytest.approx(1 / 3)
