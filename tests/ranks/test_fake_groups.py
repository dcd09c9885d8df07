"""With fake process groups and fake tensors, one process estimates the memory of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastguard
from fastguard.errors.versions import SHARDED_ESTIMATES
from guardtest.versions import needs


@pytest.fixture(params=[FakeStore, dist.HashStore])
def world(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=request.param(), rank=0, world_size=4)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


GROUPS = {
    "none": lambda world: None,
    "plain": lambda world: world,
    "replicated": fastguard.Replicated,
}


@pytest.mark.parametrize(
    "fake_tensors",
    [
        pytest.param(False, id="real"),
        pytest.param(True, id="fake", marks=needs(SHARDED_ESTIMATES)),
    ],
)
@pytest.mark.parametrize(
    ("sharded", "group"), [(0, "plain"), (0, "replicated"), (1, "none"), (1, "plain")]
)
def test_steps_with_losses_run_in_a_fake_group(
    world: dist.ProcessGroup, sharded: int, group: str, fake_tensors: bool
) -> None:
    mesh = init_device_mesh("cpu", (4,))
    with FakeTensorMode() if fake_tensors else contextlib.nullcontext():
        model = nn.Linear(8, 4)
        if sharded:
            fully_shard(model, mesh=mesh)
        opt = fastguard.GuardedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            max_norm=1.0,
            spike={"loss": fastguard.SpikeRule()},
            group=GROUPS[group](world),
        )
        for _ in range(3):
            opt.zero_grad()
            loss: Tensor = model(torch.ones(4, 8)).sum()
            loss.backward()
            opt.step(loss={"loss": loss, "other": loss * 2})
        norm = fastguard.clip_grad_norm_(model.parameters(), 1.0, group=GROUPS[group](world))
    assert norm.shape == ()
    records = opt.records()
    assert len(records) == 3 * (not fake_tensors)
    assert all({"loss", "other"} == set(record.losses) for record in records)
