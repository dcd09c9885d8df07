"""Finds the ranks that are connected by the meshes of some tensors, and a process group over them.

A submesh contains the ranks of one slice of its root mesh: if the root has pipeline stages,
`root["dp"]` on rank 0 contains ranks of the first stage only. The ranks that exchange numbers are
connected by slices: all ranks in the same slice as this rank, all ranks in the same slice as one of
those ranks, and so on. All of these ranks find the same set, because the slices along the same
dimensions partition the whole root. Ranks outside the set (other pipeline stages) do not take part.

    root (pp=2, dp=2, tp=2); tensors on root["dp"] and root["tp"]    the 4 ranks of a stage
    the same tensors, group=root["pp"].get_group()                   all 8 ranks
    dense tensors on (dp), experts on (ep, efsdp) of another view    the ranks of both
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _disable_current_modes

from fastguard.errors.versions import root_mesh_of
from fastguard.ranks.local_group import local_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """The ranks that exchange numbers.

    Attributes:
        ranks: The global ranks, in order.
        group: A process group over these ranks; None if this rank is not among them, or is the only
            one.
        n_root: Number of ranks in the root meshes; 0 without a mesh.
        n_outside: Number of ranks in the root meshes that are not among `ranks`.
    """

    ranks: tuple[int, ...]
    group: ProcessGroup | None
    n_root: int
    n_outside: int


def span_of(meshes: Sequence[DeviceMesh], own: ProcessGroup | None) -> Span:
    """Returns the ranks connected by meshes and a group; the same object for the same arguments.

    The first call with these meshes may create a process group, which only its members join.

    Args:
        meshes: The distinct meshes of this rank's tensors.
        own: The process group that the user gave, or None.

    Raises:
        ValueError: Two root meshes, or a root mesh and the group, overlap and neither contains the
            other, so that ranks would find different sets.
    """
    # The key is the identity, since equal meshes of two roots, or of two runs in one process, span
    # different ranks.
    parts = (dist.group.WORLD, own, *meshes)
    key = tuple(map(id, parts))
    known = _spans.get(key)
    if known is None:
        # The entry keeps the meshes alive, so that no other object gets one of their ids.
        known = _spans[key] = (parts, _found(meshes, own))
        while len(_spans) > KEPT:
            _spans.popitem(last=False)
    return known[1]


def ranks_of(mesh: DeviceMesh) -> list[int]:
    """Returns the global ranks of a mesh, row by row."""
    with _disable_current_modes():  # otherwise FakeTensorMode would replace the mesh's tensor
        return mesh.mesh.flatten().tolist()


KEPT = 64
"""Number of cached spans; a model has one or two."""

_spans: OrderedDict[tuple[int, ...], tuple[tuple[Any, ...], Span]] = OrderedDict()


def _found(meshes: Sequence[DeviceMesh], own: ProcessGroup | None) -> Span:
    roots = {id(root): ranks_of(root) for root in map(root_mesh_of, meshes)}
    own_ranks = [] if own is None else dist.get_process_group_ranks(own)
    _check_nested([*roots.values(), own_ranks])
    slices = [Slices(ranks_of(mesh), roots[id(root_mesh_of(mesh))]) for mesh in meshes]
    # A group such as mesh["pp"].get_group() is a slice too, of the root that contains its ranks.
    home = next((r for r in roots.values() if set(own_ranks) <= set(r)), own_ranks)
    slices.append(Slices(own_ranks, home))
    ranks = tuple(sorted(_connected(slices)))
    in_roots = set().union(*roots.values())
    n_outside = len(in_roots.difference(ranks))
    return Span(ranks, _group_over(ranks, meshes, own), len(in_roots), n_outside)


class Slices:
    """All slices of one kind in a root mesh, which are shifted copies of a given slice.

    A slice contains the positions `start + sum of k_i * stride_i` of the root, with `0 <= k_i <
    n_i`; slices of the same kind differ in `start`. If the given ranks do not form such a grid,
    they are the only slice of their kind.

    Args:
        ranks: The ranks of one slice.
        root: The ranks of the root, row by row.
    """

    def __init__(self, ranks: Sequence[int], root: Sequence[int]) -> None:
        self.first: tuple[int, ...] = tuple(ranks)
        self._root = root
        self._place = {rank: place for place, rank in enumerate(root)}
        places = sorted(self._place[rank] for rank in ranks)
        self._offsets = [place - places[0] for place in places]
        self._digits = _digits(self._offsets)
        if places and self._digits is not None and self._start(places[0]) != places[0]:
            self._digits = None

    def start_of(self, rank: int) -> int | None:
        """Returns the start of the slice that contains a rank; None if there is none."""
        if self._digits is None:
            return 0 if rank in self.first else None
        place = self._place.get(rank)
        return None if place is None else self._start(place)

    def at(self, start: int) -> Sequence[int]:
        """Returns the ranks of the slice with this start."""
        if self._digits is None:
            return self.first
        # The ranks of a user's group need not divide the root evenly, so the end of the root may
        # cut a slice.
        ends = (start + offset for offset in self._offsets)
        return [self._root[place] for place in ends if place < len(self._root)]

    def _start(self, place: int) -> int:
        assert self._digits is not None
        return place - sum(place // stride % n * stride for stride, n in self._digits)


def _digits(offsets: Sequence[int]) -> list[tuple[int, int]] | None:
    """Returns the `(stride, n)` pairs of a regular grid that starts at 0; None if irregular."""
    digits: list[tuple[int, int]] = []
    block = 1  # number of offsets described by the digits so far
    while block < len(offsets):
        stride = offsets[block]
        n = 1
        while n * block < len(offsets) and offsets[n * block] == n * stride:
            n += 1
        digits.append((stride, n))
        block *= n
    grid = [0]
    for stride, n in digits:
        grid = [k * stride + offset for k in range(n) for offset in grid]
    return digits if grid == list(offsets) else None


def _connected(slices: Sequence[Slices]) -> set[int]:
    """Returns all ranks that are connected by slices."""
    # Starts with every given slice, since a rank may hold tensors of a mesh that it does not belong
    # to.
    found = set().union(*(s.first for s in slices))
    waiting = list(found)
    done: set[tuple[int, int]] = set()
    while waiting:
        rank = waiting.pop()
        for i, s in enumerate(slices):
            start = s.start_of(rank)
            if start is None or (i, start) in done:
                continue
            done.add((i, start))
            new = [r for r in s.at(start) if r not in found]
            found.update(new)
            waiting += new
    return found


def _check_nested(sets: Iterable[Sequence[int]]) -> None:
    """Raises a ValueError if two sets of ranks overlap and neither contains the other."""
    known: list[set[int]] = []
    for ranks in map(set, sets):
        for other in known:
            if ranks & other and not (ranks <= other or other <= ranks):
                raise ValueError(
                    f"the tensors are on ranks {sorted(other)} and on ranks {sorted(ranks)}, and "
                    "no group contains both; pass group= with all ranks that must decide together"
                )
        known.append(ranks)


def _group_over(
    ranks: tuple[int, ...], meshes: Sequence[DeviceMesh], own: ProcessGroup | None
) -> ProcessGroup | None:
    """Returns a group over these ranks, an existing one if possible."""
    me, world = dist.get_rank(), dist.group.WORLD
    if len(ranks) < 2 or me not in ranks:
        return None
    assert world is not None
    for group in (own, world):
        if group is not None and _is_over(group, ranks):
            return group
    there = [group for mesh in meshes if me in ranks_of(mesh) for group in _groups_of(mesh)]
    # Chosen by name, so that all ranks choose the same group although the order of tensors may
    # differ.
    found = [group for group in there if _is_over(group, ranks) and not _is_fake(group, world)]
    if found:
        return min(found, key=lambda group: group.group_name)
    return local_group(ranks)


def _groups_of(mesh: DeviceMesh) -> list[ProcessGroup]:
    """Returns the groups of a mesh's dimensions that include this rank."""
    try:
        return [mesh.get_group(i) for i in range(mesh.ndim)]
    # the mesh was created without groups, or for a default group that was destroyed
    except RuntimeError:
        return []


def _is_over(group: ProcessGroup, ranks: tuple[int, ...]) -> bool:
    return tuple(sorted(dist.get_process_group_ranks(group))) == ranks


def _is_fake(group: ProcessGroup, world: ProcessGroup) -> bool:
    """Whether a group cannot communicate, as groups that trainers create for unused dimensions."""
    return dist.get_backend(group) == "fake" != dist.get_backend(world)
