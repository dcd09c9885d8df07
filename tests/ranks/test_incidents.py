"""All ranks react in the same way to faults on one rank."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastguard
from fastguard import GuardedOptimizer, NonFiniteGradError
from fastguard.errors import TrainingDivergedError
from guardtest.rank_guards import rank, same_on_all, sgd, weight
from guardtest.ranks import Ranks, collectives
from guardtest.training import assert_same_bits, snapshot

NAN = math.nan


# Loss scalers.


def scaled_steps(spread: str, scaler_type: str, unscale: bool, bad: dict[int, tuple[int, ...]]):
    """Returns scales and weights; `bad` lists the ranks that overflow at each step."""
    if spread == "stages":
        p = nn.Parameter(torch.zeros(3))
        mine: Tensor = p
        group: Any = dist.group.WORLD
    else:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Shard(0)]))
        group = None
    opt = GuardedOptimizer(torch.optim.AdamW([p], lr=0.1, fused=True), group=group)
    kind = torch.amp.GradScaler if scaler_type == "plain" else ShardedGradScaler
    scaler = kind("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(6):
        opt.zero_grad()
        scaler.scale((p * (rank() + 1.0 + step)).sum()).backward()
        local = p.grad._local_tensor if isinstance(p.grad, DTensor) else p.grad
        if rank() in bad.get(step, ()):
            local[0] = math.inf
        before = snapshot(opt)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        mine = p.detach()._local_tensor if isinstance(p, DTensor) else p.detach()
        assert mine.isfinite().all()
        if step in bad and step:
            assert_same_bits(local_only(snapshot(opt)), local_only(before))
    records = opt.records()
    assert [r.is_incident for r in records] == [False] * 6
    return scales, [r.action for r in records], mine.isfinite().all().item()


def local_only(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v._local_tensor if isinstance(v, DTensor) else v for k, v in state.items()}


BAD = {1: (0,), 3: (0, 1), 4: (1,)}  # two bad ranks at once: the sum of found_inf is 2


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("scaler", ["plain", "sharded"])
@pytest.mark.parametrize("spread", ["stages", "shards"])
def test_scales_stay_equal_and_nothing_is_corrupted(
    two: Ranks, spread: str, scaler: str, unscale: bool
) -> None:
    scales, actions, _ = same_on_all(two.run(scaled_steps, spread, scaler, unscale, BAD))
    expected, scale, good = [], 2.0**10, 0
    for step in range(6):
        good = 0 if step in BAD else good + 1
        scale *= 0.5 if step in BAD else 2.0 if good == 2 else 1.0
        good %= 2
        expected.append(scale)
    assert scales == expected
    assert actions == ["skipped" if step in BAD else "applied" for step in range(6)]


def scaler_without_gradients() -> tuple[float, list[str]]:
    """Steps on two ranks, one of them without gradients for the scaler to check."""
    p = nn.Parameter(torch.zeros(2))
    opt = sgd(p)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = scaler.scale((p * torch.tensor([1.0, math.inf])).sum())
    if rank() == 0:
        loss.backward()
    scaler.step(opt)
    scaler.update()
    return scaler.get_scale(), [r.action for r in opt.records()]


def test_a_rank_without_gradients_follows_the_scale_of_the_others(two: Ranks) -> None:
    assert same_on_all(two.run(scaler_without_gradients)) == (4.0, ["skipped"])


def incidents_of_a_scaled_step(case: str) -> list[Any]:
    """Takes one step of two pipeline stages with these faults, at this scale."""
    p = nn.Parameter(torch.zeros(2))
    opt = sgd(p, nonfinite="raise" if case == "raise" else "skip")
    scale = 1.0 if case == "floor of rank 1" and rank() == 1 else 1024.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale((p * 2.0).sum()).backward()
    assert p.grad is not None
    if case == "floor of rank 1" or rank() == 0:
        p.grad[0] = math.inf
    scaler.unscale_(opt)
    if case == "unseen by the scaler" and rank() == 1:
        p.grad[1] = math.inf
    if case == "loss of rank 1":
        opt.observe(NAN if rank() == 1 else 1.0)
    scaler.step(opt)
    (record,) = opt.records()
    return [record.reason, record.is_incident, opt.consecutive_skips, opt.loss_scale_skips]


@pytest.mark.parametrize("case", ["", "raise", "floor of rank 1", "unseen by the scaler",
                                  "loss of rank 1"])  # fmt: skip
def test_all_ranks_agree_on_steps_that_only_lower_a_loss_scale(two: Ranks, case: str) -> None:
    seen = same_on_all(two.run(incidents_of_a_scaled_step, case))
    if case in ("", "raise"):
        assert seen == ["loss_scale", False, 0, 1]
    else:
        assert seen == ["nonfinite_grad", True, 1, 0]


# Errors, skip budgets and dead ranks.


def raise_mode(clip_value: float | None) -> str:
    p = weight(3.0, NAN if rank() == 1 else 4.0)
    group = {"params": [p]} | ({} if clip_value is None else {"clip_value": clip_value})
    opt = GuardedOptimizer(
        torch.optim.SGD([group], lr=1.0), nonfinite="raise", group=dist.group.WORLD
    )
    with pytest.raises(NonFiniteGradError) as error:
        opt.step(loss=1.0)
    assert p.grad[0] == 3.0 and p.tolist() == [0.0, 0.0]
    return str(error.value)


@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_all_ranks_raise_before_anything_is_changed(two: Ranks, clip_value: float | None) -> None:
    other, culprit = two.run(raise_mode, clip_value)
    assert "in parameter 0 (1 NaN)" in culprit
    assert "in parameters of rank 1" in other


def raise_mode_where_one_rank_clamps() -> list[float]:
    p = weight(3.0, NAN if rank() == 1 else 4.0)
    own = {} if rank() == 1 else {"clip_value": 0.5}
    opt = GuardedOptimizer(
        torch.optim.SGD([{"params": [p]} | own], lr=1.0),
        nonfinite="raise",
        group=dist.group.WORLD,
    )
    with pytest.raises(NonFiniteGradError):
        opt.step()
    assert p.grad is not None and p.grad[0] == 3.0 and p.tolist() == [0.0, 0.0]
    p.grad = torch.tensor([3.0, 4.0])
    opt.step()
    return [*p.tolist(), opt.records()[0].total_norm]


def test_ranks_with_and_without_a_clip_value_communicate_equally_often(two: Ranks) -> None:
    clamping, other = two.run(raise_mode_where_one_rank_clamps)
    assert clamping[:2] == [-0.5, -0.5] and other[:2] == [-3.0, -4.0]
    assert clamping[2] == other[2] == pytest.approx(math.sqrt(25.5))


def clipped_by_value() -> tuple[list[float], float]:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.tensor([3.0, -0.25, -3.0, 0.25]), mesh, [Shard(0)])
    opt = GuardedOptimizer(torch.optim.SGD([{"params": [p], "clip_value": 0.5}], lr=1.0))
    opt.step()
    return p.full_tensor().tolist(), opt.records()[0].total_norm


def test_elements_of_shards_are_clamped(two: Ranks) -> None:
    weights, norm = same_on_all(two.run(clipped_by_value))
    assert weights == [-0.5, 0.25, 0.5, -0.25]
    assert norm == pytest.approx(math.sqrt(0.625))


def diverges() -> tuple[int, str]:
    p = weight(NAN if rank() == 0 else 1.0)
    opt = sgd(p, max_consecutive_skips=2)
    for step in range(1, 9):
        try:
            opt.step()
        except TrainingDivergedError as error:
            return step, str(error)
    raise AssertionError("nothing was raised")


def test_the_skip_budget_ends_on_every_rank_at_the_same_step(two: Ranks) -> None:
    (first, here), (second, there) = two.run(diverges)
    assert first == second == 3
    assert "parameter 0 (1 NaN)" in here
    assert "parameters of another rank; on rank 0" in there


def bad_gradient_before_all_reduce() -> list[Any]:
    """DDP spreads a NaN to every rank, so the record has the number of ranks but names none."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), group=fastguard.Replicated(dist.group.WORLD)
    )
    x = torch.tensor([[NAN if rank() == 1 else 1.0, 1.0]])
    model(x).sum().backward()
    opt.step()
    (record,) = opt.records()
    return [record.culprit_rank, record.culprit_ranks, record.nan, "on 2 ranks;" in str(record)]


def test_a_nan_spread_by_ddp_has_no_single_culprit_rank(two: Ranks) -> None:
    assert same_on_all(two.run(bad_gradient_before_all_reduce)) == [None, 2, 1, True]


def die_before_step() -> None:
    model = fully_shard(nn.Linear(4, 4))
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0)
    for step in range(3):
        model(torch.ones(2, 4)).sum().backward()
        if step == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.step()
        opt.zero_grad()


def test_if_a_rank_dies_torch_raises_on_the_others(two: Ranks) -> None:
    start = time.monotonic()
    survivor, dead = two.outcomes(die_before_step)
    assert time.monotonic() - start < 30
    assert dead.exitcode == -signal.SIGKILL
    assert survivor.error is not None and "gloo" in survivor.error.lower()
    assert "fastguard/stages/reduce.py" in survivor.error  # the rank dies within the collective


# A single rank of several.


def meshes_of_one() -> tuple[list[Any], float]:
    """DTensors over a mesh of this rank alone, which exchange nothing."""
    meshes = [dist.device_mesh.DeviceMesh("cpu", [0]), dist.device_mesh.DeviceMesh("cpu", [1])]
    p = nn.Parameter(distribute_tensor(torch.zeros(2), meshes[rank()], [Replicate()]))
    p.grad = distribute_tensor(torch.tensor([3.0, 4.0]), meshes[rank()], [Replicate()])
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=1.0), max_norm=1.0)
    with collectives() as seen:
        opt.step()
    return seen, opt.records()[0].total_norm


def test_a_mesh_of_one_rank_exchanges_nothing(two: Ranks) -> None:
    assert two.run(meshes_of_one) == [([], 5.0)] * 2


def stepped_copy() -> list[Any]:
    """Steps a copy of a guard, which has the same ranks."""
    opt = sgd(weight(3.0 + rank()))
    twin = copy.deepcopy(opt)
    twin.optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0 + rank()])
    twin.step()
    return [twin.records()[0].total_norm, twin.applied_steps, opt.applied_steps]


def test_a_copy_decides_with_the_same_ranks(two: Ranks) -> None:
    assert same_on_all(two.run(stepped_copy)) == [5.0, 1, 0]


def refused() -> list[str]:
    p = weight(1.0)
    errors = []
    for make in (
        lambda: sgd(p, clip_scope="tensor"),
        lambda: sgd(p, group="world"),
        lambda: GuardedOptimizer(torch.optim.LBFGS([p]), group=dist.group.WORLD),
        lambda: fastguard.Replicated(None),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            make()
        errors.append(str(error.value))
    return errors


def test_settings_without_meaning_over_ranks_are_an_error(two: Ranks) -> None:
    scope, kind, lbfgs, nothing = same_on_all(two.run(refused))
    assert "clip_scope='tensor' needs one number per tensor" in scope
    assert "group='world' is not a process group" in kind
    assert "LBFGS evaluates its closure as often as the loss of this rank" in lbfgs
    assert "group=None is not a process group" in nothing
