"""`compile_step=True` on two ranks: both skip a step that is bad on one, and stay equal."""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import fastguard
from fastguard import GuardedOptimizer
from fastguard.guard import compiled_step
from guardtest.compiled import assert_same_bits, tensors_of
from guardtest.ranks import Ranks
from guardtest.tolerances import COMPILED_RTOL

NAN = math.nan
STEPS, BAD_STEPS, BAD_RANK = 8, (0, 3, 4), 1

MAKE = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for matrices, with weight decay, and for vectors, with another rate and limit."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [
        {"params": matrices, "weight_decay": 0.1, "max_norm": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": 0.02, "max_norm": 0.02},
    ]


def guarded(optimizer: Optimizer, group: Any, compiled: bool) -> GuardedOptimizer:
    compiled_step.BACKEND = "eager"  # only in this process, because inductor takes seconds
    return GuardedOptimizer(optimizer, clip_scope="group", group=group, compile_step=compiled)


def schedule_of(opt: Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Gives the param groups different schedules."""
    return torch.optim.lr_scheduler.LambdaLR(opt, [lambda n: 1 / (1 + n), lambda n: 0.9**n])


def ddp_run(name: str, fault: str, compiled: bool) -> tuple[list[Tensor], list[str], int]:
    """Returns the weights, the actions, and the number of compiled graphs.

    Args:
        name: The name of the optimizer.
        fault: What is bad on `BAD_RANK`: its `"batch"`, which DDP spreads over the ranks; its
            `"loss"`; or its `"gradient"` after DDP has averaged it, as by a fault of the device.
        compiled: Whether the update is compiled.
    """
    torch._dynamo.utils.counters.clear()
    model = net()
    ddp = DistributedDataParallel(model)
    inner = MAKE[name](groups_of(model))
    opt = guarded(inner, fastguard.Replicated(dist.group.WORLD), compiled)
    schedule = schedule_of(opt)
    for step in range(STEPS):
        bad = step in BAD_STEPS and dist.get_rank() == BAD_RANK
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        x = torch.randn(4, 6, generator=generator)
        if bad and fault == "batch":
            x[0, 0] = NAN
        opt.zero_grad()
        loss = ddp(x).square().mean()
        loss.backward()
        if bad and fault == "gradient":
            model[0].weight.grad[0, 0] = NAN
        before = tensors_of(inner)
        opt.step(loss=loss.detach() * NAN if bad and fault == "loss" else loss)
        if step in BAD_STEPS and step > 0:  # a first step creates state
            assert_same_bits(before, tensors_of(inner))
        schedule.step()
    actions = [r.action for r in opt.records()]
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [p.detach().clone() for p in model.parameters()], actions, n_graphs


@pytest.mark.parametrize(
    ("name", "fault"),
    [("AdamW", "batch"), ("AdamW", "loss"), ("AdamW", "gradient"), ("SGD", "gradient")],
)
def test_replicas_skip_together_and_stay_equal(two: Ranks, name: str, fault: str) -> None:
    compiled = two.run(ddp_run, name, fault, True)
    plain = two.run(ddp_run, name, fault, False)
    for (weights, actions, n_graphs), (expected, theirs, _) in zip(compiled, plain, strict=True):
        assert n_graphs == 1
        assert actions == theirs
        assert tuple(i for i, a in enumerate(actions) if a == "skipped") == BAD_STEPS
        assert actions.count("clipped") >= 3
        for ours, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=COMPILED_RTOL, atol=1e-6)
    for ours, others in zip(compiled[0][0], compiled[1][0], strict=True):
        assert torch.equal(ours, others)


def stages_run(name: str, compiled: bool) -> tuple[list[Tensor], list[str], list[int]]:
    """Pipeline stages: returns weights, actions, and collectives per step."""
    shapes = [(4, 3), (5,)] if dist.get_rank() == 0 else [(2, 7)]
    generator = torch.Generator().manual_seed(dist.get_rank())
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    inner = MAKE[name](params)
    compiled_step.BACKEND = "eager"
    opt = GuardedOptimizer(inner, max_norm=0.5, group=dist.group.WORLD, compile_step=compiled)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    seen = []
    for step in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
            if step in BAD_STEPS and dist.get_rank() == BAD_RANK:
                p.grad.view(-1)[-1] = NAN
        before = tensors_of(inner)
        with patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as calls:
            opt.step()
        seen.append(calls.call_count)
        if step in BAD_STEPS and step > 0:
            assert_same_bits(before, tensors_of(inner))
        schedule.step()
    return [p.detach().clone() for p in params], [r.action for r in opt.records()], seen


def test_a_nan_on_one_rank_skips_the_step_of_the_other(two: Ranks) -> None:
    compiled = two.run(stages_run, "NAdam", True)
    plain = two.run(stages_run, "NAdam", False)
    for (weights, actions, seen), (expected, theirs, seen_there) in zip(
        compiled, plain, strict=True
    ):
        assert actions == theirs
        assert tuple(i for i, a in enumerate(actions) if a == "skipped") == BAD_STEPS
        # Each step sums one vector. The first step also compares arguments, and a bad step
        # exchanges its counts.
        assert seen == seen_there == [1 + (i == 0) + (i in BAD_STEPS) for i in range(STEPS)]
        for ours, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=COMPILED_RTOL, atol=1e-6)
