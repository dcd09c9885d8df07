"""The ranks that decide together, and the weight of each local tensor in their sums.

    norm^p = sum over the ranks of the team of   sum over its local elements of |g|^p / copies(g)

`copies(g)` is the number of ranks in the team that hold the same elements. In a team of n ranks,
`copies` is n / shards for a DTensor, whose placements give the number of shards; n for a plain
tensor beside DTensors or in a `Replicated` group; and 1 for a plain tensor in a plain process
group. Thus every element of the model counts once for any distribution. Ranks with an empty shard
or without tensors add nothing.

Tensors with the same weight, `1 / copies`, form a class. Each class is measured as a separate
segment, so that the measure stage needs no weights.
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

from fastguard.errors.logger import log
from fastguard.ranks.dtensors import dtensor_types, make_whole_
from fastguard.ranks.groups import Group, check_group, process_group_of
from fastguard.ranks.loss_names import LossNames
from fastguard.ranks.span import Span, ranks_of, span_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class Sharing:
    """The weights of this rank's tensors in the sums of its team.

    Attributes:
        team: The ranks that decide together.
        weights: `1 / copies` of each class.
        classes: The class of each tensor; None if there is only one class.
        partial: Whether some tensor is partial and has not been reduced yet.
    """

    team: Team
    weights: tuple[float, ...]
    classes: Sequence[int] | None
    partial: bool = False

    def refined(self, segments: Sequence[int] | None, n_segments: int) -> Sequence[int] | None:
        """Returns the segment of each tensor to measure: `class * n_segments + segment`."""
        if self.classes is None:
            return segments
        if segments is None:
            return self.classes
        return [c * n_segments + s for c, s in zip(self.classes, segments, strict=True)]


class Team:
    """The ranks that decide together.

    Args:
        span: The ranks, including this rank.
        group: See `Group`.

    Attributes:
        group: A process group over the ranks.
        size: Number of ranks.
        distinct: Whether the ranks of the user's group hold different plain tensors.
        rank: The global rank of this process.
    """

    def __init__(self, span: Span, group: Group) -> None:
        assert span.group is not None
        self.group: ProcessGroup = span.group
        self.size: int = len(span.ranks)
        self.distinct: bool = isinstance(group, ProcessGroup)
        own = process_group_of(group)
        self._own_ranks = [] if own is None else dist.get_process_group_ranks(own)
        self.rank: int = dist.get_rank()
        self._all_plain = not span.n_root
        self._weights: dict[tuple[int, Any], float] = {}
        self._specs: list[Any] = []
        self._sharing: Sharing | None = None

    @cached_property
    def loss_names(self) -> LossNames:
        """The positions of losses in the vector that the ranks exchange."""
        return LossNames.of(self.group)

    @property
    def has_dtensors(self) -> bool:
        """Whether any tensor is a DTensor."""
        return not self._all_plain

    def device_for(self, device: torch.device) -> torch.device:
        """Returns the device of the vector to send: the given device if the backend supports it."""
        served = [d.type for d in self.group._device_types]
        if not served or device.type in served:
            return device
        return torch.device(served[0], torch.accelerator.current_device_index())

    @cached_property
    def meets_on_host(self) -> bool:
        """Whether the vector is on a CPU on every rank, where reading it needs no sync."""
        served = {d.type for d in self.group._device_types} - {"cpu"}
        return not (served and torch.accelerator.is_available())

    def sharing(self, tensors: Sequence[Tensor]) -> Sharing:
        """Returns the weights of tensors; cached until their placements change."""
        specs = [None] if self._all_plain else list(map(_spec_of, tensors))
        known = self._specs
        if self._sharing is None or len(specs) != len(known) or not all(map(is_, specs, known)):
            self._specs, self._sharing = specs, self._weighed(specs)
        return self._sharing

    def sharing_of_gradients(self, parameters: Sequence[Tensor]) -> Sharing:
        """Reduces partial gradients, with one collective each, and returns the weights of all.

        For a parameter without a gradient, the parameter itself determines the weight.
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
        """Returns `1 / copies` of a DTensor with this spec, or of a plain tensor (None)."""
        if spec is None:
            return (len(self._own_ranks) if self.distinct else 1) / self.size
        key = (id(spec.mesh), spec.placements)
        if key not in self._weights:
            shards = 1
            for size, placement in zip(spec.mesh.shape, spec.placements, strict=True):
                shards *= size if _is_sharded(placement) else 1
            if self.distinct:  # the ranks of the group hold different elements
                inside = set(self._own_ranks).intersection(ranks_of(spec.mesh))
                shards *= len(self._own_ranks) / max(1, len(inside))
            self._weights[key] = shards / self.size
        return self._weights[key]


def team_of(tensors: Sequence[Tensor], group: Group) -> Team | None:
    """Returns the team of this rank; None if this rank decides alone.

    Args:
        tensors: The parameters of this rank, or other tensors to measure.
        group: See `Group`.

    Raises:
        TypeError: `group` is not a `Group`.
        ValueError: See `span_of`.
    """
    check_group(group)
    if process_group_of(group) is None and not dtensor_types(set(map(type, tensors))):
        return None
    span = span_of(meshes_of(tensors), process_group_of(group))
    if group is None:
        _warn_of_larger_root(span)
    return None if span.group is None else Team(span, group)


def meshes_of(tensors: Sequence[Tensor]) -> list[DeviceMesh]:
    """Returns the distinct meshes of DTensors, in order of first appearance."""
    known = dtensor_types(set(map(type, tensors)))
    if not known:
        return []
    meshes = (t.device_mesh for t in tensors if type(t) in known)  # type: ignore[attr-defined]
    return list({id(mesh): mesh for mesh in meshes}.values())


def _spec_of(t: Tensor) -> Any:
    return getattr(t, "_spec", None)


def _is_sharded(placement: Any) -> bool:
    # `is_shard` would be False for the strided shards of FSDP with tensor parallelism.
    return not (placement.is_replicate() or placement.is_partial())


_warned_of: set[tuple[int, ...]] = set()


def _warn_of_larger_root(span: Span) -> None:
    """Warns once if some ranks of the root mesh are not part of the team."""
    if not span.n_outside or span.ranks in _warned_of:
        return
    _warned_of.add(span.ranks)
    log.warning(
        "the meshes of the parameters span only %s of the %d ranks of their root mesh, so the "
        "norm and the decision cover only these ranks. If other ranks hold other parts of the "
        "model (pipeline stages), pass a group that includes these ranks, such as "
        "group=mesh['pp'].get_group()",
        len(span.ranks),
        span.n_root,
    )
