"""The ranks that decide together are those connected by the meshes of the tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastguard
from fastguard.ranks import team
from fastguard.ranks.local_group import local_group
from fastguard.ranks.span import Slices, _connected
from guardtest.ranks import Ranks, collectives
from guardtest.spreads import on, parameter
from guardtest.versions import has_torch, needs_torch

# Without processes.

SIZES = {"pp": 2, "replicate": 2, "shard": 3, "tp": 2}


def root_ranks(permuted: bool = False) -> torch.Tensor:
    n = math.prod(SIZES.values())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)) if permuted else None
    ranks = torch.arange(n) if order is None else order
    return ranks.reshape(*SIZES.values())


def slice_of(root: torch.Tensor, rank: int, dims: tuple[str, ...]) -> list[int]:
    """Returns the ranks that differ from one rank only in these dimensions."""
    at = (root == rank).nonzero()[0].tolist()
    index = tuple(slice(None) if name in dims else at[i] for i, name in enumerate(SIZES))
    return root[index].flatten().tolist()


KINDS = [("tp",), ("shard",), ("replicate", "tp"), ("shard", "tp"), ("pp",), ("pp", "shard"), ()]


@pytest.mark.parametrize("permuted", [False, True], ids=["in-order", "permuted"])
@pytest.mark.parametrize(("a", "b"), list(product(KINDS, KINDS)), ids=str)
def test_two_kinds_of_slices_span_what_their_dimensions_span(
    a: tuple[str, ...], b: tuple[str, ...], permuted: bool
) -> None:
    root = root_ranks(permuted)
    flat = root.flatten().tolist()
    for rank in (0, 7, 23):
        slices = [Slices(slice_of(root, rank, dims), flat) for dims in (a, b)]
        assert _connected(slices) == set(slice_of(root, rank, a + b))


def test_irregular_ranks_form_a_separate_slice() -> None:
    assert _connected([Slices([0, 1, 3], range(6))]) == {0, 1, 3}
    assert _connected([Slices([1, 2], range(6))]) == {1, 2}  # no mesh of 6 ranks has such a slice
    assert _connected([Slices([0, 1, 3], range(6)), Slices([0, 3], range(6))]) == {0, 1, 3, 4}


def test_each_slice_of_a_root_is_visited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing all pairs would take 10^8 steps on 16,384 ranks."""
    walked = []
    at = Slices.at
    monkeypatch.setattr(Slices, "at", lambda self, start: walked.append(start) or at(self, start))
    n = 512
    assert len(_connected([Slices(range(n), range(n)), Slices(range(0, n, 8), range(n))])) == n
    assert sorted(walked) == sorted([0, *range(8)])


# On four ranks.


def unflattened() -> DeviceMesh:
    """Returns two views of a root without dimensions of its own."""
    world = init_device_mesh("cpu", (4,), mesh_dim_names=("world",))
    return world._unflatten(0, (2, 2), ("pp", "dp"))


def named(pp: str, dp: str) -> Callable[[], DeviceMesh]:
    return lambda: init_device_mesh("cpu", (2, 2), mesh_dim_names=(pp, dp))


ROOTS: dict[str, tuple[Callable[[], DeviceMesh], str, str]] = {
    "pp": (named("pp", "dp"), "pp", "dp"),
    "another name": (named("outer", "inner"), "outer", "inner"),
    "stages inside": (named("fsdp", "stage"), "stage", "fsdp"),
}
if has_torch(2, 10):  # meshes have `_unflatten`
    ROOTS["unflattened"] = unflattened, "pp", "dp"


def stage_and_shards(name: str) -> tuple[DeviceMesh, DeviceMesh, int]:
    make, stages, shards = ROOTS[name]
    root = make()
    return root[stages], root[shards], root.get_local_rank(stages)


def norms_of_stages(name: str) -> tuple[float, float, float, list[str]]:
    """Returns torch's and our norm of this stage, and our norm of all stages with their group."""
    team._warned_of.clear()
    pipeline, mesh, stage = stage_and_shards(name)
    p = on(mesh, torch.full((4,), 1.0 + 9 * stage), Shard(0))
    said: list[str] = []
    logging.getLogger("fastguard").addFilter(lambda r: said.append(r.getMessage()) or True)
    theirs = torch.nn.utils.get_total_norm([p.grad]).full_tensor().item()
    ours = [fastguard.get_total_norm([p.grad]).item() for _ in range(2)]
    everything = fastguard.get_total_norm([p.grad], group=pipeline.get_group())
    logging.getLogger("fastguard").filters.clear()
    assert ours[0] == ours[1]
    return theirs, ours[0], everything.item(), said


@pytest.mark.parametrize("name", ROOTS)
def test_the_norm_covers_the_stage_only(four: Ranks, name: str) -> None:
    results = four.run(norms_of_stages, name)
    assert sorted(ours for _, ours, *_ in results) == [2.0, 2.0, 20.0, 20.0]
    for theirs, ours, everything, said in results:
        # Torch's square root may have an error of one ulp.
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert everything == pytest.approx(math.hypot(2.0, 20.0), rel=1e-6)
        (warning,) = said  # one warning for all calls, and none for calls with a group
        assert "2 of the 4 ranks of their root mesh" in warning
        assert "pass a group that includes these ranks" in warning


def one_stage_alone(name: str) -> list[float]:
    """Each stage makes other calls, as in an interleaved schedule, without waiting."""
    _, mesh, stage = stage_and_shards(name)
    found = []
    if stage == 0:
        p = on(mesh, torch.ones(4), Shard(0))
        for _ in range(3):
            found.append(fastguard.clip_grad_norm_([p], 1.0).item())
        opt = fastguard.GuardedOptimizer(torch.optim.SGD([p], lr=0.1), max_norm=1.0)
        opt.step()
        found.append(opt.records()[0].total_norm)
    return found


@pytest.mark.parametrize("name", ROOTS)
def test_a_call_on_one_stage_alone_does_not_hang(four: Ranks, name: str) -> None:
    results = four.run(one_stage_alone, name, timeout=15.0)
    called = [found for found in results if found]
    assert len(called) == 2
    for first, *others in called:
        assert first == 2.0 and others == pytest.approx([1.0] * 3, rel=1e-5)


def experts_on_one_stage(joined: bool) -> tuple[float, int]:
    """Only stage 1 has experts, on another view of the ranks, and a plain tensor.

    Returns the norm, and the number of ranks in each collective of a step.
    """
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    sparse = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "efsdp", "ep"))
    params = [on(dense["fsdp"], torch.ones(4), Shard(0))]
    if dense.get_local_rank("pp") == 1:
        experts = on(sparse["efsdp", "ep"], torch.full((4, 4), 2.0), Shard(1), Shard(0))
        params = [experts, *params, parameter(torch.full((1,), 3.0))]
    opt = fastguard.GuardedOptimizer(
        torch.optim.SGD(params, lr=0.1),
        max_norm=1e3,
        group=dense["pp"].get_group() if joined else None,
    )
    opt.step()
    assert opt._gradients.team is not None
    return opt.records()[0].total_norm, opt._gradients.team.size


def test_experts_on_one_stage_do_not_affect_the_other(four: Ranks) -> None:
    alone, experts = (2.0, 2), (math.sqrt(4 + 64 + 9), 2)
    found = four.run(experts_on_one_stage, False, timeout=15.0)
    assert found == [alone] * 2 + [(pytest.approx(experts[0]), 2)] * 2


def test_combined_stages_include_the_experts(four: Ranks) -> None:
    found = four.run(experts_on_one_stage, True, timeout=15.0)
    assert found == [(pytest.approx(math.sqrt(4 + 4 + 64 + 9)), 4)] * 4


def groups_made() -> list[object]:
    """Counts the process groups created over one dimension, over both, and in later calls."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    one = on(root["b"], torch.ones(4), Shard(0))
    both = on(root, torch.ones(4, 4), Replicate(), Shard(0))
    counts = []
    for params in ([one], [both], [one, both], [one], [both], [one, both]):
        before = len(dist.distributed_c10d._world.pg_map)
        with collectives() as seen:
            fastguard.clip_grad_norm_(params, 1e3)
        assert seen == [("allreduce_", 56)]
        counts.append(len(dist.distributed_c10d._world.pg_map) - before)
    return counts


def test_existing_groups_are_used(four: Ranks) -> None:
    """The groups of the dimension and of all ranks are used."""
    assert four.run(groups_made) == [[0] * 6] * 4


def new_groups(world_is_bound: bool) -> list[tuple[bool, float, list[int]]]:
    """Creates groups that no mesh has; only their members take part, and only once."""
    rank, world = dist.get_rank(), dist.group.WORLD
    device = torch.device("cuda", 0) if world_is_bound else None
    make, bound_while_made, found = dist.new_group, [], []
    dist.new_group = lambda *a, **kw: (
        bound_while_made.append(world.bound_device_id) or make(*a, **kw)
    )
    for members in ((0, 2, 3), (0, 1), (1, 3), (0, 1, 3)):
        if rank not in members:
            continue
        world.bound_device_id = device
        group = local_group(members)
        is_kept = local_group(members) is group and world.bound_device_id == device
        world.bound_device_id = None
        total = torch.full((1,), 1.0 + rank)
        dist.all_reduce(total, group=group)
        found.append((is_kept, total.item(), dist.get_process_group_ranks(group)))
    dist.new_group = make
    # Otherwise NCCL would split the world group, and all ranks would have to join.
    assert bound_while_made == [None] * len(found)
    return found


@pytest.mark.parametrize("world_is_bound", [False, True], ids=["", "bound-to-a-device"])
def test_a_new_group_needs_only_its_members(world_is_bound: bool) -> None:
    with Ranks(4) as ranks:  # new processes, because groups are cached
        results = ranks.run(new_groups, world_is_bound, timeout=30.0)
    first, second, third = (True, 8.0, [0, 2, 3]), (True, 3.0, [0, 1]), (True, 6.0, [1, 3])
    fourth = (True, 7.0, [0, 1, 3])
    assert results == [
        [first, second, fourth], [second, third, fourth], [first], [first, third, fourth]
    ]  # fmt: skip


def fake_groups() -> float:
    """The fake group of a dimension, as trainers create them, is not used."""
    root = init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=("pp", "dp"), backend_override={"dp": "fake"}
    )
    whole = torch.arange(4.0)
    local = whole[2 * root.get_local_rank("dp") :][:2].clone()
    p = parameter(DTensor.from_local(local, root["dp"], [Shard(0)], run_check=False))
    return fastguard.clip_grad_norm_([p], 1e3).item()


@needs_torch(2, 10, "init_device_mesh(backend_override=...)")
def test_fake_groups_are_ignored(four: Ranks) -> None:
    assert four.run(fake_groups, timeout=15.0) == pytest.approx([math.sqrt(14)] * 4)


def mesh_without_groups() -> list[float]:
    """Meshes that describe ranks but have no groups."""
    half = 2 * (dist.get_rank() // 2)
    found = []
    for ranks, placements in (
        ([half, half + 1], [Shard(0)]),
        ([[0, 1], [2, 3]], [Replicate(), Shard(0)]),
    ):
        mesh = DeviceMesh("cpu", ranks, _init_backend=False)
        local = torch.full((2,), 1.0 + dist.get_rank())
        p = parameter(DTensor.from_local(local, mesh, placements, run_check=False))
        found.append(fastguard.measure_grads([p]).power_sum.item())
    return found


def test_a_mesh_without_groups_gets_a_new_group(four: Ranks) -> None:
    """Over one dimension, the norm is that of two ranks; over both, that of unequal replicas."""
    both = 2 * (1 + 4 + 9 + 16) / 2
    expected = [[2 * (1 + 4), both]] * 2 + [[2 * (9 + 16), both]] * 2
    assert four.run(mesh_without_groups, timeout=15.0) == expected
