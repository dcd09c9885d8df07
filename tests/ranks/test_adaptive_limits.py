"""Adaptive limits are equal on one, two and four ranks, for any distribution of tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastguard import (
    AGC,
    AdaGC,
    AutoClip,
    GuardedOptimizer,
    Replicated,
    StepRecord,
    ZClip,
    clip_grad_adaptive_,
)
from guardtest.ranks import Ranks

RULES = {"zclip": ZClip(warmup=5, max_norm=None), "autoclip": AutoClip(window=8)}
STEPS, BAD_STEPS = 40, (0, 3, 20)


def gradients(step: int) -> list[torch.Tensor]:
    """Returns four gradients; in bad steps the last one contains a NaN."""
    generator = torch.Generator().manual_seed(step)
    scale = 50.0 if step % 11 == 10 else 1.0
    grads = [torch.randn(5, generator=generator) * scale for _ in range(4)]
    if step in BAD_STEPS:
        grads[3][1] = math.nan
    return grads


def train(rule: str, first: int, last: int, group: object = None) -> list[StepRecord]:
    """Runs a guard on the tensors from `first` to `last`."""
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(first, last)]
    inner = torch.optim.SGD(parameters, lr=0.1)
    opt = GuardedOptimizer(inner, max_norm=RULES[rule], group=group)
    take_steps(opt, parameters, first, last)
    return opt.records()


def take_steps(
    opt: GuardedOptimizer, parameters: list[torch.nn.Parameter], first: int, last: int
) -> None:
    for step in range(STEPS):
        for p, grad in zip(parameters, gradients(step)[first:last], strict=True):
            p.grad = grad
        opt.step()


def train_a_share(rule: str) -> list[StepRecord]:
    n = 4 // dist.get_world_size()
    return train(rule, dist.get_rank() * n, (dist.get_rank() + 1) * n, dist.group.WORLD)


def train_a_copy(rule: str) -> list[StepRecord]:
    return train(rule, 0, 4, Replicated(dist.group.WORLD))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_ranks", ["two", "four"])
@pytest.mark.parametrize("spread", [train_a_share, train_a_copy])
def test_all_ranks_set_the_same_limits_as_one_process(spread, n_ranks, rule, request):
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


def train_by_tensor(spread: str) -> tuple[list[StepRecord], torch.Tensor, torch.Tensor]:
    """Returns records, the state of AdaGC with one average per tensor, and the weights.

    Args:
        spread: `"alone"` (one process), `"copies"` (each rank holds all tensors), or `"shards"`
            (DTensors sharded over the ranks).
    """
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(4)]
    group = Replicated(dist.group.WORLD) if spread == "copies" else None
    if spread == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parameters = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters
        ]
    inner = torch.optim.SGD(parameters, lr=0.1)
    opt = GuardedOptimizer(
        inner, max_norm=AdaGC(warmup=5, ratio=1.01), clip_scope="tensor", group=group
    )
    for step in range(STEPS):
        for p, grad in zip(parameters, gradients(step), strict=True):
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if spread == "shards" else grad
        opt.step()
    weights = [p.detach().full_tensor() if spread == "shards" else p.detach() for p in parameters]
    return opt.records(), opt._state.limits.clone(), torch.stack(weights)


@pytest.mark.parametrize("n_ranks", ["two", "four"])
@pytest.mark.parametrize("spread", ["copies", "shards"])
def test_each_tensor_has_the_same_average_as_in_one_process(spread, n_ranks, request):
    ranks: Ranks = request.getfixturevalue(n_ranks)
    alone, limits, weights = train_by_tensor("alone")
    assert [r.step - 1 for r in alone if r.action == "skipped"] == list(BAD_STEPS)
    assert len(set(limits[1].tolist())) == 4 and limits[0].tolist() == [STEPS - 3.0] * 4
    runs = ranks.run(train_by_tensor, spread)
    for records, own, moved in runs:
        assert [r.limit for r in records] == [r.limit for r in runs[0][0]]
        assert [r.action for r in records] == [r.action for r in alone]
        assert torch.equal(own, runs[0][1])
        torch.testing.assert_close(own, limits, rtol=1e-9, atol=0)
        torch.testing.assert_close(moved, weights, rtol=1e-5, atol=1e-7)


def refused_shards() -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    inner = torch.optim.SGD([p], lr=0.1)
    messages = []
    for call in (
        lambda: clip_grad_adaptive_([("body.weight", p)]),
        lambda: GuardedOptimizer(
            inner, max_norm=AGC(), clip_scope="unit", named_parameters=[("body.weight", p)]
        ),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="clip_scope='unit' needs one number per tensor"):
        q = torch.nn.Parameter(torch.ones(2))
        GuardedOptimizer(
            torch.optim.SGD([q], lr=0.1),
            max_norm=AGC(),
            clip_scope="unit",
            group=dist.group.WORLD,
        )
    return messages


def test_clipping_units_of_a_dtensor_raises_an_error_that_names_it(two):
    for messages in two.run(refused_shards):
        for message in messages:
            assert message.startswith("body.weight is a DTensor") and "max_norm=1.0" in message


def train_units() -> tuple[list[StepRecord], torch.Tensor]:
    p = torch.nn.Parameter(torch.ones(4, 5))
    group = Replicated(dist.group.WORLD) if dist.is_initialized() else None
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=0.1), max_norm=AGC(), clip_scope="unit", group=group
    )
    for step in range(10):
        p.grad = torch.stack(gradients(step))
        opt.step()
    return opt.records(), p.detach()


def test_replicas_clip_the_same_units_as_one_process(two):
    alone, weight = train_units()
    for records, own in two.run(train_units):
        assert torch.equal(own, weight)
        assert [r.clip_coef for r in records] == [r.clip_coef for r in alone]


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


def test_ranks_with_different_rules_raise_an_error(two):
    for message in two.run(other_rules):
        assert "warmup=5" in message and "warmup=6" in message
