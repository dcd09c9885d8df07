"""Runs with `GuardedLR`, scripted as good and bad steps."""

from __future__ import annotations

import math

import torch

from fastguard import GuardedLR, GuardedOptimizer

GOOD, BAD = 1.0, math.nan


def guarded(lr: float = 1.0, n_groups: int = 1, **kwargs) -> GuardedOptimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(n_groups)]
    return GuardedOptimizer(torch.optim.SGD(groups, lr=lr, **kwargs))


def play(opt: GuardedOptimizer, lr: GuardedLR, losses: list[float]) -> list[float]:
    """The learning rate after each step of a run with these losses."""
    seen = []
    for loss in losses:
        opt.step(loss=loss)
        lr.step()
        seen.append(round(float(opt.param_groups[0]["lr"]), 9))
    return seen
