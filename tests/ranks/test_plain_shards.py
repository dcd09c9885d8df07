"""Shards in plain tensors raise an error without a group."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer

import fastguard
from fastguard import GuardedOptimizer, Replicated
from fastguard.ranks import plain_shards
from guardtest.ranks import Ranks


class Net(nn.Module):
    """One layer has only small 1-D parameters, of which one of two ranks gets no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


def fsdp(strategy: str, use_orig_params: bool, nested: bool = False) -> nn.Module:
    options: dict[str, Any] = {
        "device_id": torch.device("cpu"),
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": use_orig_params,
    }
    model = Net()
    if nested:
        model.norm = FullyShardedDataParallel(model.norm, **options)
    return FullyShardedDataParallel(model, **options)


def backward(model: nn.Module) -> list[Tensor]:
    """Computes gradients that differ between ranks before they are reduced."""
    model(torch.ones(2, 6) * (1 + dist.get_rank())).square().sum().backward()
    return list(model.parameters())


def raised(attempt: Any) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def without_a_group(strategy: str, use_orig_params: bool, nested: bool) -> list[str]:
    model = fsdp(strategy, use_orig_params, nested)
    wrapped = torch.optim.SGD(model.parameters(), lr=0.1)
    before = raised(lambda: GuardedOptimizer(wrapped))
    params = backward(model)
    world = Replicated(dist.group.WORLD)
    return [
        before,
        *map(
            raised,
            (
                lambda: GuardedOptimizer(wrapped, max_norm=1.0),
                lambda: fastguard.clip_grad_norm_(params, 1.0),
                lambda: fastguard.measure_grads(model.named_parameters()),
                lambda: fastguard.sanitize_grads_(params),
                lambda: fastguard.clip_grad_norm_(params, 1.0),  # a second call raises again
                lambda: fastguard.clip_grad_norm_(params, 1.0, group=world),
            ),
        ),
    ]


@pytest.mark.parametrize("nested", [False, True], ids=["one-unit", "nested"])
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "original"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_without_a_group_are_an_error(
    two: Ranks, strategy: str, use_orig_params: bool, nested: bool
) -> None:
    for *refusals, replicated in two.run(without_a_group, strategy, use_orig_params, nested):
        if strategy == "NO_SHARD":  # flattened replicas
            assert [*refusals, replicated] == [""] * 7
            continue
        for said in refusals:
            assert "shards of FullyShardedDataParallel in plain tensors" in said
            assert "pass group=torch.distributed.group.WORLD" in said
            assert "for HYBRID_SHARD, pass the process group that shards one replica" in said
        assert "group=Replicated(...) means that all ranks hold the same tensors" in replicated


def without_a_norm(use_orig_params: bool) -> tuple[list[str], float]:
    """Clamping needs no norm; flat buckets have no argument for a group."""
    params = backward(fsdp("FULL_SHARD", use_orig_params))
    flat = fastguard.FlatGradBuckets(params)
    said = [raised(flat.measure), raised(lambda: flat.clip_grad_norm_(1.0))]
    fastguard.clip_grad_value_(params, 1.0)
    with fastguard.patch_torch():
        torch.nn.utils.clip_grad_value_(params, 0.5)
    grads = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    return said, grads.abs().max().item()


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "original"])
def test_shards_where_no_group_can_be_passed(two: Ranks, use_orig_params: bool) -> None:
    for said, largest in two.run(without_a_norm, use_orig_params):
        assert largest == 0.5
        for refusal in said:
            assert "shards of FullyShardedDataParallel" in refusal
            assert refusal.endswith("or GuardedOptimizer(..., flat_buckets=True, group=)")


def guarded_step(use_orig_params: bool, bad: bool) -> tuple[float, int, float]:
    """Returns our norm with the group, the number of skipped steps, and FSDP's own norm."""
    model = fsdp("FULL_SHARD", use_orig_params)
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1e3, group=dist.group.WORLD
    )
    params = backward(model)
    if bad and dist.get_rank() == 1:
        next(p.grad for p in params if p.grad is not None and p.grad.numel()).view(-1)[0] = math.nan
    opt.step()
    theirs = model.clip_grad_norm_(1e9).item()
    return opt.records()[0].total_norm, opt.skipped_steps, theirs


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "original"])
def test_with_the_group_all_ranks_decide_as_one(two: Ranks, use_orig_params: bool) -> None:
    for ours, skipped, theirs in two.run(guarded_step, use_orig_params, False):
        assert (ours, skipped) == (pytest.approx(theirs, rel=1e-6), 0)
    norms = two.run(guarded_step, use_orig_params, True)
    assert [skipped for _, skipped, _ in norms] == [1, 1]
    assert len({ours for ours, *_ in norms}) == 1


def only_vectors(strategy: str) -> tuple[list[str], float, float]:
    """Trains biases only; returns the errors without a group and as replicas, and two norms."""
    model = Net()
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name)
    sharded = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=True,
    )
    wrapped = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
    world = dist.group.WORLD
    said = [
        raised(lambda g=g: GuardedOptimizer(wrapped, group=g)) for g in (None, Replicated(world))
    ]
    group = Replicated(world) if strategy == "NO_SHARD" else world
    opt = GuardedOptimizer(wrapped, group=group)
    backward(sharded)
    theirs = sharded.clip_grad_norm_(1e9).item()
    opt.step()
    return said, opt.records()[0].total_norm, theirs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vectors_are_shards_only_if_they_were_split(two: Ranks, strategy: str) -> None:
    for said, ours, theirs in two.run(only_vectors, strategy):
        assert ours == pytest.approx(theirs, rel=1e-6)
        for refusal in said:
            assert ("shards of FullyShardedDataParallel" in refusal) == (strategy != "NO_SHARD")


def units(strategy: str, use_orig_params: bool) -> list[str]:
    """Returns the errors of the function and the guard for tensors without complete rows."""
    model = fsdp(strategy, use_orig_params)
    params = backward(model)
    group = Replicated(dist.group.WORLD) if strategy == "NO_SHARD" else dist.group.WORLD
    said = []
    for attempt in (
        lambda: fastguard.clip_grad_adaptive_(params),
        lambda: GuardedOptimizer(
            torch.optim.SGD(params), max_norm=fastguard.AGC(), clip_scope="unit", group=group
        ),
    ):
        try:
            attempt()
            said.append("")
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "original"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adaptive_clipping_of_sharded_units_is_an_error(
    two: Ranks, strategy: str, use_orig_params: bool
) -> None:
    for of_function, of_guard in two.run(units, strategy, use_orig_params):
        if strategy == "NO_SHARD" and use_orig_params:
            assert of_function == of_guard == ""
            continue
        assert "is a part of a flat tensor of FullyShardedDataParallel" in of_function
        assert "max_norm=1.0" in of_function
        assert of_guard == of_function or "the ranks of a process group hold different" in of_guard


def a_trainers_own_recipe() -> tuple[float, float, list[str]]:
    """Combines the norms of shards itself, like FSDP, using torch's functions."""
    plain_shards._warned.clear()
    model = fsdp("FULL_SHARD", True)
    params = backward(model)
    said: list[str] = []
    logging.getLogger("fastguard").addFilter(lambda r: said.append(r.getMessage()) or True)
    with fastguard.patch_torch():
        square = torch.nn.utils.clip_grad_norm_(params, math.inf) ** 2
        torch.nn.utils.clip_grad_norm_(params, math.inf)
    logging.getLogger("fastguard").filters.clear()
    dist.all_reduce(square)
    return square.sqrt().item(), model.clip_grad_norm_(1e9).item(), said


def test_patched_functions_behave_as_in_torch_and_warn_once(two: Ranks) -> None:
    for recipe, theirs, said in two.run(a_trainers_own_recipe):
        assert recipe == pytest.approx(theirs, rel=1e-6)
        (warning,) = said
        assert "the norm covers only the shards of this rank" in warning


def zero_redundancy(group: str | None) -> str | tuple[float, list[float], int]:
    """Returns the error, or the norm, all weights, and the number of skipped steps."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    wrapped = ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=1.0)
    world = dist.group.WORLD
    given = {None: None, "plain": world, "replicated": Replicated(world)}[group]
    said = raised(lambda: GuardedOptimizer(wrapped, group=given))
    if said:
        return said
    opt = GuardedOptimizer(wrapped, max_norm=1.0, group=given)
    for p in params:
        p.grad = torch.ones(4)
    opt.step()
    norm = opt.records()[0].total_norm
    if dist.get_rank() == 0:  # a fault on one rank after the all-reduce
        params[2].grad[0] = math.nan
    opt.step()
    return norm, torch.cat([p.detach() for p in params]).tolist(), opt.skipped_steps


def test_with_zero_redundancy_all_ranks_step_or_none(two: Ranks) -> None:
    for group in (None, "plain"):
        for said in two.run(zero_redundancy, group):
            assert "pass group=fastguard.Replicated(torch.distributed.group.WORLD)" in said
    first, second = two.run(zero_redundancy, "replicated")
    assert first == second
    norm, weights, skipped = first
    assert (norm, skipped) == (pytest.approx(math.sqrt(12)), 1)
    assert weights == pytest.approx([1 - 1 / math.sqrt(12)] * 12, rel=1e-5)


def made_before() -> tuple[list[str], int, list[bool]]:
    """Creates the optimizer before the model is sharded; adds a param group later."""
    model = Net()
    early = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    early_weights = [torch.nn.Parameter(torch.ones(2))]
    other = GuardedOptimizer(torch.optim.SGD(early_weights, lr=0.1))
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    params = backward(sharded)
    before = [p.detach().clone() for p in params]
    said = [raised(early.step) for _ in range(2)]
    said.append(raised(lambda: other.add_param_group({"params": params})))
    said.append(raised(lambda: fastguard.clip_grad_norm_(params, 1.0)))
    unchanged = [torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    return said, early.applied_steps + len(other.param_groups) - 1, unchanged


def test_parameters_sharded_later_are_an_error_at_the_first_step(two: Ranks) -> None:
    for said, n, unchanged in two.run(made_before):
        assert all("shards of FullyShardedDataParallel" in s for s in said)
        assert n == 0 and all(unchanged)


class Replaces(torch.optim.SGD):
    """Like DeepSpeed, `partition()` replaces parameters with a float32 partition."""

    def partition(self, n_ranks: int) -> None:
        (old,) = self.param_groups[0]["params"]
        old._hp_mapping = object()
        part = old.detach().clone().float()[:: n_ranks or 1].requires_grad_()
        part.grad = torch.ones_like(part)
        self.param_groups[0]["params"] = [part]


def deepspeed(n_ranks: int, marked: bool) -> list[str]:
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    if marked:  # stage 3
        p.ds_id = 0
        return [raised(lambda: GuardedOptimizer(torch.optim.SGD([p])))]
    wrapped = Replaces([p], lr=0.1)
    opt = GuardedOptimizer(wrapped)
    wrapped.partition(n_ranks)
    said = [raised(opt.step) for _ in range(2)]
    assert bool(opt.applied_steps) == (not said[0])
    return said


def test_partitions_of_deepspeed(two: Ranks) -> None:
    for said in [*two.run(deepspeed, 2, False), *two.run(deepspeed, 2, True)]:
        assert all("shards of DeepSpeed ZeRO in plain tensors" in s for s in said)
    # A whole tensor in another dtype is accepted.
    assert two.run(deepspeed, 1, False) == [["", ""]] * 2


def looked_through() -> tuple[int, int]:
    """Counts how often lists of the same parameters are searched."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    looks = []
    kind = plain_shards._kind
    plain_shards._kind = lambda *args: looks.append(1) or kind(*args)
    try:
        for n in (3, 3, 3, 2):
            fastguard.clip_grad_norm_(params[:n], 1.0)
    finally:
        plain_shards._kind = kind
    return len(looks), len(plain_shards._cleared)


def test_parameters_are_searched_once(two: Ranks) -> None:
    assert [n for n, _ in two.run(looked_through)] == [2, 2]
