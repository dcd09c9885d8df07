"""Ways to distribute the gradients of one small model over four ranks.

Each function returns pairs of `(index of the tensor, parameter on this rank)`, and the `group` to
pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import fastguard
from fastguard.ranks.groups import Group

SHAPES = ((5, 3), (8, 4), (2,), (), (4, 6))  # shards of 5 rows are uneven, of 2 rows partly empty


def model_gradients() -> list[Tensor]:
    """Gradients, equal on every rank and in the process with the reference."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


Parts = list[tuple[int, nn.Parameter]]
Spread = Callable[[list[Tensor]], tuple[Parts, Group]]


def parameter(grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


def on(mesh: DeviceMesh, grad: Tensor, *placements: Placement) -> nn.Parameter:
    """A distributed parameter with this gradient; a scalar is replicated."""
    if not grad.dim():
        placements = (Replicate(),) * mesh.ndim
    return parameter(distribute_tensor(grad, mesh, placements))


def ddp(grads: list[Tensor]) -> tuple[Parts, Group]:
    parts = [(i, parameter(g.clone())) for i, g in enumerate(grads)]
    return parts, fastguard.Replicated(dist.group.WORLD)


def fsdp(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (4,))
    return [(i, on(mesh, g, Shard(0))) for i, g in enumerate(grads)], None


def hsdp(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [(i, on(mesh, g, Replicate(), Shard(0))) for i, g in enumerate(grads)], None


def tensor_parallel(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (4,))
    placements = (Shard(1), Shard(0), Replicate(), Replicate(), Shard(1))
    return [
        (i, on(mesh, g, p)) for i, (g, p) in enumerate(zip(grads, placements, strict=True))
    ], None


def both_dimensions(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dims = ((0, 1), (0, 0), (0, 0), (0, 0), (1, 0))
    return [
        (i, on(mesh, g, Shard(a), Shard(b)))
        for i, (g, (a, b)) in enumerate(zip(grads, dims, strict=True))
    ], None


def with_plain_tensors(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (4,))
    sharded = [on(mesh, g, Shard(0)) for g in grads[:2]]
    return list(enumerate([*sharded, *map(parameter, (g.clone() for g in grads[2:]))])), None


def two_meshes(grads: list[Tensor]) -> tuple[Parts, Group]:
    """Some tensors are sharded over all ranks, some over one dimension of the same root mesh."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    flat = init_device_mesh("cpu", (4,))
    meshes = (flat, root["tp"], root["dp"], flat, root["tp"])
    return [
        (i, on(m, g, Shard(0))) for i, (g, m) in enumerate(zip(grads, meshes, strict=True))
    ], None


def partial(grads: list[Tensor]) -> tuple[Parts, Group]:
    """Each rank holds a partial sum."""
    mesh = init_device_mesh("cpu", (4,))
    parts = []
    for i, grad in enumerate(grads):
        p = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, [Replicate()]))
        share = grad * (1.0, 0.0, 1.0, -1.0)[dist.get_rank()]  # such partial sums are exact
        p.grad = DTensor.from_local(share, mesh, [Partial()])
        parts.append((i, p))
    return parts, None


def pipeline(grads: list[Tensor]) -> tuple[Parts, Group]:
    """The last rank has no elements."""
    stage = {0: (0, 1), 1: (2, 4), 2: (3,), 3: ()}[dist.get_rank()]
    return [(i, parameter(grads[i].clone())) for i in stage], dist.group.WORLD


def pipeline_of_shards(grads: list[Tensor]) -> tuple[Parts, Group]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = {0: (0, 1, 2), 1: (3, 4)}[mesh.get_local_rank("pp")]
    parts = [(i, on(mesh["dp"], grads[i], Shard(0))) for i in stage]
    return parts, mesh["pp"].get_group()


def stages_without_a_root(grads: list[Tensor]) -> tuple[Parts, Group]:
    """Each stage has its own mesh; a plain group contains all ranks."""
    first, second = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    mine, stage = ((first, (0, 3)), (second, (1, 2, 4)))[dist.get_rank() // 2]
    return [(i, on(mine, grads[i], Shard(0))) for i in stage], dist.group.WORLD


def experts(grads: list[Tensor]) -> tuple[Parts, Group]:
    """Experts are plain tensors, distinct over one mesh dimension; the rest is sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    mine = mesh.get_local_rank("ep")
    parts = [(i, on(mesh, grads[i], Shard(0), Shard(0))) for i in (0, 2, 3)]
    parts.append(((1, 4)[mine], parameter(grads[(1, 4)[mine]].clone())))
    return parts, mesh["ep"].get_group()


def frozen_elsewhere(grads: list[Tensor]) -> tuple[Parts, Group]:
    """All ranks hold the parameters, but only one has their gradients."""
    parts = [(i, parameter(g.clone())) for i, g in enumerate(grads)]
    if dist.get_rank() != 2:
        for _, p in parts:
            p.grad = None
    return parts, dist.group.WORLD


SPREADS = {
    spread.__name__: spread
    for spread in (
        ddp, fsdp, hsdp, tensor_parallel, both_dimensions, with_plain_tensors, two_meshes, partial,
        pipeline, pipeline_of_shards, stages_without_a_root, experts, frozen_elsewhere,
    )
}  # fmt: skip
