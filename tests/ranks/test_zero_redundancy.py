"""`ZeroRedundancyOptimizer`: each rank has a part of the state, and one rank saves all of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from fastguard import GuardedOptimizer, Replicated, Rollback
from guardtest.ranks import Ranks
from guardtest.training import give_gradients, new_parameters


def made(guarded: bool) -> tuple[list[torch.nn.Parameter], Any]:
    parameters = new_parameters()
    inner = ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=0.1)
    if not guarded:
        return parameters, inner
    return parameters, GuardedOptimizer(inner, group=Replicated(dist.group.WORLD))


def stepped(parameters: list[torch.nn.Parameter], opt: Any, steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        opt.step()


def resumed(guarded: bool) -> list[list[float]]:
    parameters, opt = made(guarded)
    stepped(parameters, opt, range(3))
    opt.consolidate_state_dict(0)  # a method of ZeroRedundancyOptimizer
    box = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    others, fresh = made(guarded)
    with torch.no_grad():
        for p, q in zip(others, parameters, strict=True):
            p.copy_(q)
    given = copy.deepcopy(box[0])
    fresh.load_state_dict(given)
    if guarded:
        assert fresh.applied_steps == 3
        assert given["state"].keys() == box[0]["state"].keys()
        assert all(given["state"][i] is not None for i in given["state"])
    stepped(others, fresh, range(3, 5))
    return [p.flatten().tolist() for p in others]


def refused_by_rollback() -> str:
    _, opt = made(True)
    try:
        Rollback(opt, {})
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_guard_resumes_like_the_unguarded_optimizer(two: Ranks) -> None:
    assert two.run(resumed, True) == two.run(resumed, False)


def test_rollback_raises_an_error_with_the_reason(two: Ranks) -> None:
    for said in two.run(refused_by_rollback):
        assert "'optimizer' cannot be saved" in said and "consolidate_state_dict" in said
