"""Creates a process group without the participation of ranks outside of the group.

`torch.distributed.new_group(..., use_local_synchronization=True)` creates such groups, but has two
problems, which this module solves:

    name     torch hashes the ranks together with the number of groups of this process. If members
             have different numbers of groups (as with an embedding group of the first and the last
             stage), they wait for each other under different names until the timeout.
    start    If the default group is bound to a device (`init_process_group(device_id=...)`), torch
             splits its communicator, for which NCCL waits for the whole world.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import ProcessGroup

_groups: dict[tuple[int, ...], ProcessGroup] = {}
# the default group at the time when `_groups` were created
_default_group: ProcessGroup | None = None


def local_group(ranks: tuple[int, ...]) -> ProcessGroup:
    """Returns the process group of these ranks, which include this rank; cached.

    Every member must call this function. Only the first call waits for the other members.
    """
    global _default_group
    world = dist.group.WORLD
    assert world is not None
    if _default_group is not world:  # earlier groups no longer exist
        _groups.clear()
        _default_group = world
    if ranks not in _groups:
        with _named_by_ranks(ranks), _unbound(world):
            group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(group, ProcessGroup)
        _groups[ranks] = group
    return _groups[ranks]


@contextmanager
def _named_by_ranks(wanted: tuple[int, ...]) -> Iterator[None]:
    """Makes torch name a group of these ranks by the ranks alone."""
    c10d = dist.distributed_c10d
    theirs = c10d._process_group_name
    ours = "fastguard_" + hashlib.sha256(repr(wanted).encode()).hexdigest()[:32]

    def name(ranks: Sequence[int], use_hashed_name: bool) -> str:
        is_ours = use_hashed_name and tuple(ranks) == wanted
        return ours if is_ours else theirs(ranks, use_hashed_name)

    c10d._process_group_name = name
    try:
        yield
    finally:
        c10d._process_group_name = theirs


@contextmanager
def _unbound(world: ProcessGroup) -> Iterator[None]:
    """Unbinds the default group from its device."""
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound
