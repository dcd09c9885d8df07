"""Guards on several ranks, and their results."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastguard import GuardedOptimizer, Replicated


def rank() -> int:
    return dist.get_rank()


def weight(*values: float) -> nn.Parameter:
    """A parameter with these gradient values."""
    p = nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values)
    return p


def a_model() -> nn.Sequential:
    """A model of two layers, equal on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(*parameters: Tensor, **options: Any) -> GuardedOptimizer:
    """A guard over all ranks, which hold different tensors unless the options say otherwise."""
    options.setdefault("group", dist.group.WORLD)
    return GuardedOptimizer(torch.optim.SGD([{"params": list(parameters)}], lr=1.0), **options)


def parameters(n: int) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2)) for _ in range(n)]
    for p in made:
        p.grad = torch.ones(2)
    return made


def guard_over(
    group: Any, counts: tuple[int, ...] = (1,), clip_value: float | None = None, **options: Any
) -> GuardedOptimizer:
    """Returns a guard over a process group or `Replicated`, with this many parameters per param
    group."""
    groups: list[dict[str, Any]] = [{"params": parameters(n)} for n in counts]
    if clip_value is not None:
        groups[0]["clip_value"] = clip_value
    world = dist.group.WORLD
    return GuardedOptimizer(
        torch.optim.SGD(groups, lr=1.0),
        group=Replicated(world) if group == "replicated" else world,
        **options,
    )


def same_on_all(results: list[Any]) -> Any:
    assert all(result == results[0] for result in results), results
    return results[0]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def replicated(**options: Any) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    options = {"watch": ("replica_drift",), "watch_every": 1} | options
    return {"group": Replicated(dist.group.WORLD), **options}
