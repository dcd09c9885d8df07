"""What a user may pass as `group=`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastguard.errors.plain_text import shown


@dataclass(frozen=True, slots=True)
class Replicated:
    """A process group whose ranks hold the same plain tensors, with the same gradients (DDP).

    Norms count every tensor once, losses of all ranks are joined, and all ranks decide the same.

    Args:
        group: The group, usually `torch.distributed.group.WORLD`.

    Raises:
        TypeError: `group` is no process group.

    Example:
        >>> import os, torch, torch.distributed as dist, fastguard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> opt = fastguard.GuardedOptimizer(
        ...     torch.optim.SGD([weight]), group=fastguard.Replicated(dist.group.WORLD)
        ... )
        >>> dist.destroy_process_group()
    """

    group: ProcessGroup

    def __post_init__(self) -> None:
        _need_process_group(self.group)


class AsTorch:
    """In place of None, what `patch_torch` passes: the caller knows torch's functions alone, so
    nothing is asked of it that it could only answer with a group.
    """


AS_TORCH = AsTorch()

Group = ProcessGroup | Replicated | AsTorch | None
"""None: one process, or the ranks that the meshes of DTensors span. A process group: plain tensors
are distinct over it (pipeline stages, experts). `Replicated`: plain tensors are the same on all its
ranks."""


def check_group(group: object) -> None:
    """Raises a TypeError for what is no `Group`."""
    if group is not None and not isinstance(group, (Replicated, AsTorch)):
        _need_process_group(group)


def check_same_tensors(group: Group, what: str) -> None:
    """Raises a ValueError where a coefficient of one tensor has no meaning over the group."""
    if isinstance(group, ProcessGroup):
        raise ValueError(
            f"{what} asks for a number of each tensor, but the ranks of a plain group hold "
            "different tensors; ask for one of all of them, or leave group out"
        )


def process_group_of(group: Group) -> ProcessGroup | None:
    """The process group that a user means; None without one."""
    if isinstance(group, Replicated):
        return group.group
    return None if isinstance(group, AsTorch) else group


def several_ranks() -> bool:
    """Whether this process is one of several that talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_several_ranks() -> None:
    """Raises a ValueError where a rank would decide alone by a loss that others do not know."""
    if several_ranks():
        raise ValueError(
            "a loss is given on one of several ranks, which would decide apart from the others; "
            "pass group=fastguard.Replicated(torch.distributed.group.WORLD) to the guard if all "
            "ranks hold the same parameters (DDP), group=the_process_group if they hold different "
            "ones, or no loss"
        )


def _need_process_group(group: object) -> None:
    if not dist.is_available():
        raise TypeError(f"group={shown(group)}: this build of torch has no torch.distributed")
    if isinstance(group, ProcessGroup):
        return
    remedy = "pass a torch.distributed.ProcessGroup, or fastguard.Replicated(one)"
    if isinstance(group, dist.device_mesh.DeviceMesh):
        remedy = "pass mesh.get_group() of the dimension meant"
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        remedy = "this rank is no member of it; pass a group that this rank belongs to"
    raise TypeError(f"group={shown(group)} is no process group; {remedy}")
