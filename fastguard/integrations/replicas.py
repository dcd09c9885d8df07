"""Who decides together when a framework trains replicas of a model, one a process (DDP)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fastguard.ranks.groups import Replicated


def group_of_replicas(replicated: bool) -> dict[str, Any]:
    """The `group` argument of `GuardedOptimizer`, as keyword arguments.

    Args:
        replicated: The framework keeps one replica of the model in each of several processes.
    """
    if replicated and dist.is_initialized() and dist.group.WORLD is not None:
        return {"group": Replicated(dist.group.WORLD)}
    return {}
