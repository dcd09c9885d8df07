"""Adaptive limits on one, two and four ranks: one limit, whoever holds the tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from fastguard import AdaGC, AutoClip, GuardedOptimizer, Replicated, StepRecord, ZClip
from guardtest.ranks import Ranks

RULES = {"zclip": ZClip(warmup=5, max_norm=None), "autoclip": AutoClip(window=8)}
STEPS, BAD_STEPS = 40, (0, 3, 20)


def gradients(step: int) -> list[torch.Tensor]:
    """Of four tensors; in bad steps the last one holds a NaN."""
    generator = torch.Generator().manual_seed(step)
    scale = 50.0 if step % 11 == 10 else 1.0
    grads = [torch.randn(5, generator=generator) * scale for _ in range(4)]
    if step in BAD_STEPS:
        grads[3][1] = math.nan
    return grads


def train(rule: str, first: int, last: int, group: object = None) -> list[StepRecord]:
    """A run over the tensors from `first` to `last`."""
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(first, last)]
    inner = torch.optim.SGD(parameters, lr=0.1)
    opt = GuardedOptimizer(inner, max_norm=RULES[rule], group=group)
    for step in range(STEPS):
        for p, grad in zip(parameters, gradients(step)[first:last], strict=True):
            p.grad = grad
        opt.step()
    return opt.records()


def train_a_share(rule: str) -> list[StepRecord]:
    n = 4 // dist.get_world_size()
    return train(rule, dist.get_rank() * n, (dist.get_rank() + 1) * n, dist.group.WORLD)


def train_a_copy(rule: str) -> list[StepRecord]:
    return train(rule, 0, 4, Replicated(dist.group.WORLD))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_ranks", ["two", "four"])
@pytest.mark.parametrize("spread", [train_a_share, train_a_copy])
def test_all_ranks_set_the_limits_of_one_process(spread, n_ranks, rule, request):
    ranks: Ranks = request.getfixturevalue(n_ranks)
    alone = train(rule, 0, 4)
    assert sum(r.action == "clipped" for r in alone) >= 2
    assert [r.step - 1 for r in alone if r.action == "skipped"] == list(BAD_STEPS)
    runs = ranks.run(spread, rule)
    for records in runs:
        assert [r.limit for r in records] == [r.limit for r in runs[0]]
        assert [r.clip_coef for r in records] == [r.clip_coef for r in runs[0]]
        assert [r.action for r in records] == [r.action for r in alone]
        assert [r.limit for r in records] == pytest.approx([r.limit for r in alone], rel=1e-12)


def other_rules() -> str:
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    rule = AdaGC(warmup=5 + dist.get_rank())
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=0.1), max_norm=rule, group=Replicated(dist.group.WORLD)
    )
    with pytest.raises(ValueError, match="max_norm") as caught:
        opt.step()
    return str(caught.value)


def test_ranks_with_other_rules_are_told_so(two):
    for message in two.run(other_rules):
        assert "warmup=5" in message and "warmup=6" in message
