"""Creates a process group by its members alone, without the other ranks of the world.

`torch.distributed.new_group(..., use_local_synchronization=True)` almost does this, but

    its name    is a hash of the ranks and of how many groups this process has. Members with
                different numbers of groups (the embedding group of the first and the last stage,
                say) would wait for each other under different names, until the timeout.
    its start   splits the communicator of the default group if that is bound to a device
                (`init_process_group(device_id=...)`), for which NCCL waits for the whole world.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import ProcessGroup

_made: dict[tuple[int, ...], ProcessGroup] = {}
_made_in: ProcessGroup | None = None  # the default group at that time


def local_group(ranks: tuple[int, ...]) -> ProcessGroup:
    """Returns the group of some ranks, including this one; the same object each time.

    Every member must call it; only the first call waits for the others.
    """
    global _made_in
    world = dist.group.WORLD
    assert world is not None
    if _made_in is not world:  # earlier groups no longer exist
        _made.clear()
        _made_in = world
    if ranks not in _made:
        with _named_by_ranks(ranks), _unbound(world):
            group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(group, ProcessGroup)
        _made[ranks] = group
    return _made[ranks]


@contextmanager
def _named_by_ranks(wanted: tuple[int, ...]) -> Iterator[None]:
    """Names groups over these ranks by the ranks alone."""
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
