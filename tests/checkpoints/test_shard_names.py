"""On several ranks, shared tensors are stored once, and tensors that differ once per rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastguard import CheckpointStore
from guardtest.ranks import Ranks

NAN = float("nan")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def store_of(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, group=dist.group.WORLD)


def sizes(folder: Path) -> tuple[int, int]:
    weights = {"w": torch.full((10_000,), 2.0)}
    own = {"w": torch.full((10_000,), float(dist.get_rank()))}
    with store_of(folder) as store:
        shared = store.save(weights=weights, step=0)
        apart = store.save(weights=own, step=1)
        assert torch.equal(store.load(1).state["weights"]["w"], own["w"])
        return shared.size, apart.size


def test_tensors_shared_by_all_ranks_are_stored_once(two: Ranks, tmp_path: Path) -> None:
    (shared, apart), _ = two.run(sizes, tmp_path)
    assert apart - shared > 30_000


def pipeline_stages(folder: Path) -> bool:
    """Two stages of two ranks; both number their parameters from 0."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(dist.get_rank() // 2)
    stage = torch.nn.Linear(4, 4 if dist.get_rank() < 2 else 6)
    fully_shard(stage, mesh=mesh["dp"])
    expected = stage.weight.to_local().clone()
    with store_of(folder) as store:
        assert store.save(stage=stage, step=0).clean
        torch.nn.init.zeros_(stage.weight)
        store.load("last-clean", stage=stage)
        restored = torch.equal(stage.weight.to_local(), expected)
        stage.weight.detach().to_local().fill_(NAN)
        bad = dict((name, nan) for name, nan, *_ in store.save(stage=stage, step=1).bad)
        # The counts of all stages, under the user's name.
        assert bad == {"stage.weight": 4 * 4 + 6 * 4}, bad
    return restored


def test_stages_with_equal_parameter_names_are_kept_apart(four: Ranks, tmp_path: Path) -> None:
    assert four.run(pipeline_stages, tmp_path) == [True] * 4


def stages_alike(folder: Path) -> list[bool]:
    """Two stages of two ranks that differ only in their values."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(dist.get_rank() // 2)
    stage = torch.nn.Linear(4, 4)
    fully_shard(stage, mesh=mesh["dp"])
    expected = stage.weight.to_local().clone()
    everyone: list[Any] = [None] * 4
    dist.all_gather_object(everyone, expected.tolist())
    with store_of(folder) as store:
        store.save(stage=stage, step=0)
        torch.nn.init.zeros_(stage.weight)
        store.load("last", stage=stage)
    others = [values for values in everyone if values != expected.tolist()]
    return [torch.equal(stage.weight.to_local(), expected), len(others) == 3]


def test_stages_of_equal_shapes_get_back_their_own_weights(four: Ranks, tmp_path: Path) -> None:
    assert four.run(stages_alike, tmp_path) == [[True, True]] * 4


def bytes_alike(folder: Path) -> list[Any]:
    rank = dist.get_rank()
    shape = torch.zeros((4,) if rank == 0 else (2, 2))
    dtype = torch.zeros(4, dtype=torch.float32 if rank == 0 else torch.int32)
    with store_of(folder) as store:
        store.save(m={"shape": shape, "dtype": dtype}, step=0)
        state = store.load().state["m"]
    return [tuple(state["shape"].shape), state["dtype"].dtype]


def test_equal_bytes_with_another_shape_or_dtype_are_stored_per_rank(
    two: Ranks, tmp_path: Path
) -> None:
    answers = two.run(bytes_alike, tmp_path)
    assert answers == [[(4,), torch.float32], [(2, 2), torch.int32]]
