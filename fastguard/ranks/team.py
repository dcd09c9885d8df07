"""The ranks that take one decision, and how much each tensor of this rank counts in their sums.

    norm^p = sum over the ranks of the team of   sum over its local elements of |g|^p / copies(g)

`copies(g)` is the number of ranks of the team that hold the same elements: n / shards for a DTensor
with that many shards (its placements say so) among n ranks, n for a plain tensor beside DTensors or
in a `Replicated` group, 1 for a plain tensor of a plain group. So every element of the model counts
once, however it is spread, and ranks with an empty shard or no tensor at all simply add nothing.

Tensors of the same weight form a class; each class is a segment of its own while measuring, so that
the stages need not know of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fastguard.ranks.dtensors import dtensor_types, make_whole_
from fastguard.ranks.groups import Group, check_group, process_group_of
from fastguard.ranks.loss_names import LossNames

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STAGES = ("pp", "pipeline", "pipe", "stage")  # what mesh dimensions of pipelines are called


@dataclass(frozen=True, eq=False)
class Sharing:
    """How the sums of this rank enter those of its team.

    Attributes:
        team: Who exchanges them.
        weights: Of each class, `1 / copies`.
        classes: Of each tensor, its class; None if there is one.
        partial: Whether a tensor has yet to be made whole.
    """

    team: Team
    weights: tuple[float, ...]
    classes: Sequence[int] | None
    partial: bool = False

    def refined(self, segments: Sequence[int] | None, n_segments: int) -> Sequence[int] | None:
        """The segments to measure: those of class c are `c * n_segments + segment`."""
        if self.classes is None:
            return segments
        if segments is None:
            return self.classes
        return [c * n_segments + s for c, s in zip(self.classes, segments, strict=True)]


class Team:
    """The ranks that take one decision together.

    Args:
        tensors: The parameters of this rank, or other tensors to measure.
        group: See `Group`.

    Raises:
        ValueError: Meshes and group have no common root: no one set of ranks contains all.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self.distinct = isinstance(group, ProcessGroup)
        own = process_group_of(group)
        self._own_ranks = [] if own is None else dist.get_process_group_ranks(own)
        meshes = meshes_of(tensors)
        if group is None:
            _refuse_pipelines(meshes)
        self.group = _common_root(meshes, own, self._own_ranks)
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank()
        self._all_plain = not meshes
        self._weights: dict[tuple[int, Any], float] = {}
        self._specs: list[Any] = []
        self._sharing: Sharing | None = None

    @cached_property
    def loss_names(self) -> LossNames:
        """The places of losses in the vector that the ranks exchange."""
        return LossNames.of(self.group)

    def device_for(self, device: torch.device) -> torch.device:
        """Where the vector must lie to travel: with the gradients, if the backend serves that."""
        served = [d.type for d in self.group._device_types]
        if not served or device.type in served:
            return device
        return torch.device(served[0], torch.accelerator.current_device_index())

    def sharing(self, tensors: Sequence[Tensor]) -> Sharing:
        """The weights of tensors, one entry each; kept while they lie where they lay before."""
        specs = [None] if self._all_plain else list(map(_spec_of, tensors))
        known = self._specs
        if self._sharing is None or len(specs) != len(known) or not all(map(is_, specs, known)):
            self._specs, self._sharing = specs, self._weighed(specs)
        return self._sharing

    def sharing_of_gradients(self, parameters: Sequence[Tensor]) -> Sharing:
        """The weights of gradients; partial ones are made whole first, one collective each.

        A parameter without a gradient stands for itself.
        """
        sharing = self.sharing([p if p.grad is None else p.grad for p in parameters])
        if sharing.partial:
            make_whole_(parameters)
            sharing = self.sharing([p if p.grad is None else p.grad for p in parameters])
        return sharing

    def _weighed(self, specs: list[Any]) -> Sharing:
        of_spec = [self._weight(spec) for spec in specs]
        weights = tuple(sorted(set(of_spec))) or (1.0,)
        partial = any(any(p.is_partial() for p in s.placements) for s in specs if s is not None)
        if len(weights) == 1:
            return Sharing(self, weights, None, partial)
        index = {weight: c for c, weight in enumerate(weights)}
        return Sharing(self, weights, [index[weight] for weight in of_spec], partial)

    def _weight(self, spec: Any) -> float:
        """1 / copies of a DTensor with this spec; None: of a plain tensor."""
        if spec is None:
            return (len(self._own_ranks) if self.distinct else 1) / self.size
        key = (id(spec.mesh), spec.placements)
        if key not in self._weights:
            shards = 1
            for size, placement in zip(spec.mesh.shape, spec.placements, strict=True):
                shards *= size if _is_sharded(placement) else 1
            if self.distinct:  # over the group, every mesh holds other elements
                inside = set(self._own_ranks).intersection(spec.mesh.mesh.flatten().tolist())
                shards *= len(self._own_ranks) / max(1, len(inside))
            self._weights[key] = shards / self.size
        return self._weights[key]


def team_of(tensors: Sequence[Tensor], group: Group) -> Team | None:
    """The team of a rank; None if it decides alone.

    Raises:
        TypeError: `group` is no `Group`.
        ValueError: See `Team`.
    """
    if group is None and not dtensor_types(set(map(type, tensors))):
        return None
    check_group(group)
    team = Team(tensors, group)
    return team if team.size > 1 else None


def meshes_of(tensors: Sequence[Tensor]) -> list[DeviceMesh]:
    """The different meshes of DTensors, in order of first appearance."""
    known = dtensor_types(set(map(type, tensors)))
    if not known:
        return []
    meshes = (t.device_mesh for t in tensors if type(t) in known)  # type: ignore[attr-defined]
    return list({id(mesh): mesh for mesh in meshes}.values())


def _spec_of(t: Tensor) -> Any:
    return getattr(t, "_spec", None)


def _is_sharded(placement: Any) -> bool:
    # Not is_shard(): that is False for the strided shards of FSDP over tensor parallelism.
    return not (placement.is_replicate() or placement.is_partial())


def _common_root(
    meshes: Sequence[DeviceMesh], own: ProcessGroup | None, own_ranks: list[int]
) -> ProcessGroup:
    """The smallest known group that contains the root of every mesh and the group itself."""
    roots = list({id(root): root for root in (m._get_root_mesh() for m in meshes)}.values())
    ranks_of = [root.mesh.flatten().tolist() for root in roots]
    largest = max([own_ranks, *ranks_of], key=len)
    for ranks in (own_ranks, *ranks_of):
        if not set(ranks) <= set(largest):
            raise ValueError(
                f"the tensors lie on ranks {sorted(largest)} and on ranks {sorted(ranks)}, and no "
                "group contains both; pass group= of all ranks that shall decide together"
            )
    if own is not None and len(own_ranks) == len(largest):
        return own
    return _group_over(roots[ranks_of.index(largest)], largest)


_made: dict[tuple[int, ...], ProcessGroup] = {}


def _group_over(mesh: DeviceMesh, ranks: list[int]) -> ProcessGroup:
    """A group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if len(ranks) == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    key = tuple(sorted(ranks))
    if key not in _made:
        made = dist.new_group(list(key), use_local_synchronization=True)
        assert isinstance(made, ProcessGroup)  # of this rank's own mesh
        _made[key] = made
    return _made[key]


def _refuse_pipelines(meshes: Sequence[DeviceMesh]) -> None:
    """Without a group, what a mesh leaves out of its root counts as replicated: no pipeline is."""
    for mesh in meshes:
        root = mesh._get_root_mesh()
        spanned = set(mesh.mesh_dim_names or ())
        for name in root.mesh_dim_names or ():
            if name in _STAGES and name not in spanned and root[name].size() > 1:
                raise ValueError(
                    f"the parameters lie on a part of a mesh with a dimension {name!r}, whose "
                    f"stages hold different tensors; pass group=mesh[{name!r}].get_group()"
                )
