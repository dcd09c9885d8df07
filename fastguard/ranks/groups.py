"""The values that a user may pass as `group=`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastguard.errors.plain_text import shown


@dataclass(frozen=True, slots=True)
class Replicated:
    """A process group whose ranks hold the same plain tensors with the same gradients (DDP).

    Norms count every tensor once, losses of all ranks are combined, and all ranks make the same
    decision.

    Args:
        group: The group, usually `torch.distributed.group.WORLD`.

    Raises:
        TypeError: `group` is not a process group.

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
    """The group that `patch_torch` passes instead of None.

    Code that calls torch's functions cannot pass a group, so errors must not ask for one.
    """


AS_TORCH = AsTorch()

Group = ProcessGroup | Replicated | AsTorch | None
"""None: one process, or the ranks spanned by the meshes of DTensors. A process group: its ranks
hold different plain tensors (pipeline stages, experts). `Replicated`: its ranks hold the same plain
tensors."""


def check_group(group: object) -> None:
    """Raises a TypeError for values that are not a `Group`."""
    if group is not None and not isinstance(group, (Replicated, AsTorch)):
        _need_process_group(group)


def check_same_tensors(group: Group, what: str) -> None:
    """Raises a ValueError for a process group, whose ranks have no tensors in common."""
    if isinstance(group, ProcessGroup):
        raise ValueError(
            f"{what} needs one number per tensor, but the ranks of a process group hold different "
            "tensors; use one number for all tensors, or pass no group"
        )


def process_group_of(group: Group) -> ProcessGroup | None:
    """Returns the process group of a `group` argument; None if there is none."""
    if isinstance(group, Replicated):
        return group.group
    return None if isinstance(group, AsTorch) else group


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_several_ranks() -> None:
    """Raises a ValueError on several ranks, since other ranks do not know the loss of this one."""
    if several_ranks():
        raise ValueError(
            "a loss was passed on one of several ranks, so this rank could decide differently "
            "from the other ranks; pass group=fastguard.Replicated(torch.distributed.group.WORLD) "
            "to the guard if all ranks hold the same parameters (DDP), group=the_process_group if "
            "they hold different parameters, or do not pass a loss"
        )


def _need_process_group(group: object) -> None:
    if not dist.is_available():
        raise TypeError(f"group={shown(group)}: this build of torch has no torch.distributed")
    if isinstance(group, ProcessGroup):
        return
    remedy = "pass a torch.distributed.ProcessGroup, or fastguard.Replicated(process_group)"
    if isinstance(group, dist.device_mesh.DeviceMesh):
        remedy = "pass mesh.get_group() with the intended dimension"
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        remedy = "this rank is not a member of the group; pass a group that contains this rank"
    raise TypeError(f"group={shown(group)} is not a process group; {remedy}")
