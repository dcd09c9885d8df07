"""Who decides together when a framework trains in several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from fastguard.ranks.groups import Replicated


def usual_group(
    options: Mapping[str, Any], world_size: int, *, replicated: bool
) -> dict[str, Replicated]:
    """The `group` of `GuardedOptimizer` that goes with how a framework spreads a model.

    Args:
        options: What the user gave; a `group` there is left alone.
        world_size: How many processes train.
        replicated: Each holds one replica of the model, with the same gradients (DDP).

    Returns:
        The argument by name, or nothing.

    Raises:
        ValueError: Only the user can know what the ranks hold: each would decide for itself.

    Example:
        >>> usual_group({}, 1, replicated=False)
        {}
    """
    if world_size == 1 or "group" in options:
        return {}
    world = dist.group.WORLD
    if not replicated or world is None:
        raise ValueError(
            f"the {world_size} processes do not hold replicas of the model, so give the guard a "
            "group=: None where parameters are DTensors (FSDP2, tensor parallelism), the process "
            "group where each rank holds other plain tensors (FSDP1)"
        )
    return {"group": Replicated(world)}
