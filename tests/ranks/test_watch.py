"""`RankWatch` finds the rank where a bad gradient appeared, before the reduction hides it."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastguard
from fastguard import GuardedOptimizer, RankWatch, Replicated, StepRecord
from guardtest.ranks import Ranks, collectives

NAN, INF = math.nan, math.inf


class Poison(torch.autograd.Function):
    """The identity function with a given gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad + ctx.value, None


class Net(nn.Module):
    """Has a bad gradient only in `up`, on request."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 2)

    def forward(self, x: Tensor, poison: float = 0.0) -> Tensor:
        return self.down(Poison.apply(self.up(x), poison))


def build(way: str, watched: bool = True, **kwargs: Any) -> tuple[nn.Module, GuardedOptimizer, Any]:
    net: nn.Module = Net()
    named = list(net.named_parameters())
    group = None
    if way == "ddp":
        model: nn.Module = DistributedDataParallel(net, gradient_as_bucket_view=True)
        assert dist.group.WORLD is not None
        group = Replicated(dist.group.WORLD)
    else:
        if way == "hsdp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net.up, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
        named = list(net.named_parameters())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = GuardedOptimizer(inner, named_parameters=named, group=group)
    return model, opt, RankWatch(opt, model, **kwargs) if watched else None


def step(
    model: nn.Module, opt: GuardedOptimizer, bad: dict[int, float], seed: int = 0
) -> StepRecord:
    """Takes a step with bad gradients on some ranks, and returns its record."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))
    opt.zero_grad()
    model(x, bad.get(dist.get_rank(), 0.0)).square().mean().backward()
    opt.step()
    return opt.records()[-1]


def named_rank(way: str) -> list[Any]:
    model, opt, _ = build(way)
    last = dist.get_world_size() - 1
    seen = []
    for i, bad in enumerate(({}, {last: NAN}, {}, {0: INF}, {0: NAN, last: NAN})):
        record = step(model, opt, bad, i)
        seen.append((record.action, record.culprit_ranks, record.culprit_rank, record.culprits))
    return seen


@pytest.mark.parametrize("way", ["ddp", "fsdp", "hsdp"])
def test_the_rank_is_named_on_all_ranks_and_the_parameter_on_it(
    two: Ranks, four: Ranks, way: str
) -> None:
    ranks = four if way == "hsdp" else two
    answers = ranks.run(named_rank, way)
    last = len(answers) - 1
    for seen in answers:
        assert [(action, n, rank) for action, n, rank, _ in seen] == [
            ("applied", 0, None),
            ("skipped", 1, last),
            ("applied", 0, None),
            ("skipped", 1, 0),
            ("skipped", 2, None),
        ]
    # Counts of whole tensors, which no shard contains.
    whole = (("up.weight", 32, 0, 0), ("up.bias", 8, 0, 0))
    assert answers[last][1][3] == whole and answers[last][4][3] == whole == answers[0][4][3]
    names = {name for name, *_ in answers[0][3][3]}
    assert names == {"up.weight", "up.bias"}
    assert not answers[0][0][3] and not answers[0][2][3]


def without_watch(way: str) -> int:
    model, opt, _ = build(way, watched=False)
    return step(model, opt, {1: NAN}).culprit_ranks


def test_without_a_watch_the_culprit_rank_is_unknown(two: Ranks) -> None:
    assert two.run(without_watch, "ddp") == [2, 2]
    assert two.run(without_watch, "fsdp") == [2, 2]


def same_training(way: str) -> bool:
    trained = []
    for watched in (False, True):
        model, opt, watch = build(way, watched)
        for i in range(4):
            step(model, opt, {1: NAN} if i == 2 else {}, i)
            if watched and i == 2:
                watch.remove()
                assert opt.rank_watch is None
        trained.append([p.detach().clone() for p in model.parameters()])
    local = [[getattr(p, "_local_tensor", p) for p in run] for run in trained]
    return all(map(torch.equal, *local))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_watch_changes_no_bit_of_the_training(two: Ranks, way: str) -> None:
    assert two.run(same_training, way) == [True, True]


def traffic(way: str, watched: bool) -> list[tuple[str, int]]:
    model, opt, _ = build(way, watched)
    step(model, opt, {})
    with collectives() as seen:
        step(model, opt, {})
    return [call for call in seen if call[1] <= 512]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_watch_exchanges_nothing(two: Ranks, way: str) -> None:
    assert two.run(traffic, way, True) == two.run(traffic, way, False)


def accumulated(way: str) -> Any:
    model, opt, _ = build(way)
    opt.zero_grad()
    for micro in range(3):
        synced = micro == 2
        if way == "fsdp":
            model.set_requires_gradient_sync(synced)
        context = model.no_sync() if way == "ddp" and not synced else torch.enable_grad()
        with context:
            bad = NAN if (micro, dist.get_rank()) == (1, 1) else 0.0
            model(torch.ones(1, 4), bad).square().mean().backward()
    opt.step()
    record = opt.records()[-1]
    return record.culprit_ranks, record.culprit_rank


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_accumulation_before_one_reduction(two: Ranks, way: str) -> None:
    assert two.run(accumulated, way) == [(1, 1), (1, 1)]


def compressed() -> tuple[Any, bool]:
    assert dist.group.WORLD is not None
    model, opt, _ = build("ddp", comm_hook=bf16_compress_hook, comm_state=dist.group.WORLD)
    record = step(model, opt, {0: NAN})
    model(torch.ones(1, 4)).sum().backward()
    grad = model.module.down.bias.grad
    return record.culprit_rank, bool(torch.equal(grad, grad.bfloat16().float()))


def test_another_communication_hook_does_the_reduction(two: Ranks) -> None:
    assert two.run(compressed) == [(0, True), (0, True)]


UNSHARDED = 4 * (4 * 8 + 8 + 8 * 2 + 2)  # bytes of the gradients of a Net


def portions(flush_bytes: int) -> list[tuple[list[int], list[int], Any]]:
    """Returns the number of gradients measured per call, in `backward` and `step` of two steps."""
    import fastguard.guard.rank_watch as watch

    sizes: list[int] = []
    measure, default = RankWatch._measure, watch.FLUSH_BYTES

    def counting(self: RankWatch, gradients: Any) -> None:
        sizes.append(len(gradients))
        measure(self, gradients)

    RankWatch._measure, watch.FLUSH_BYTES = counting, flush_bytes  # type: ignore[method-assign]
    try:
        model, opt, _ = build("fsdp")
        found = []
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(1, 4), NAN if dist.get_rank() else 0.0).square().mean().backward()
            backward = [*sizes]
            sizes.clear()
            opt.step()
            found.append((backward, [*sizes], opt.records()[-1].culprit_rank))
            sizes.clear()
        return found
    finally:
        RankWatch._measure, watch.FLUSH_BYTES = measure, default  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("flush_bytes", "in_backward", "in_step"),
    [(1, [1, 1, 1, 1], []), (UNSHARDED, [4], []), (UNSHARDED + 1, [], [4])],
    ids=["each", "just enough", "not enough"],
)
def test_gradients_are_measured_in_portions(
    two: Ranks, flush_bytes: int, in_backward: list[int], in_step: list[int]
) -> None:
    assert two.run(portions, flush_bytes) == [[(in_backward, in_step, 1)] * 2] * 2


def after_removal() -> tuple[list[int], int, int, list[bool]]:
    model, opt, watch = build("fsdp")
    handles = []
    for i in range(3):
        step(model, opt, {}, i)
        handles.append(len(watch._handles))
    model(torch.ones(1, 4)).sum().backward()
    held = [weakref.ref(grad) for _, grad in watch._waiting]
    watch.remove()
    watch.remove()
    left = len(watch._handles)
    opt.zero_grad()
    dead = [ref() is None for ref in held]
    model(torch.ones(1, 4)).sum().backward()
    return handles, left, len(watch._waiting), dead


def test_an_ended_watch_holds_no_references_and_receives_nothing(two: Ranks) -> None:
    for handles, left, waiting, dead in two.run(after_removal):
        assert handles[0] > 0 and handles == handles[:1] * 3  # no hook is registered twice
        assert (left, waiting, dead) == (0, 0, [True] * 4)


def unused_parameters() -> tuple[Any, Any]:
    model, opt, _ = build("fsdp")
    model.down.weight.requires_grad_(False)
    model.down.bias.requires_grad_(False)
    record = step(model, opt, {1: NAN})
    return record.culprit_rank, record.culprits[:1] if dist.get_rank() else None


def test_frozen_parameters_are_ignored(two: Ranks) -> None:
    assert two.run(unused_parameters) == [(1, None), (1, (("up.weight", 32, 0, 0),))]


def partly_optimized(way: str) -> Any:
    """The optimizer has only the parameters of `up`."""
    model, opt, watch = build(way)
    watch.remove()
    net = model.module if way == "ddp" else model
    group = Replicated(dist.group.WORLD) if way == "ddp" else None
    named = [(f"up.{name}", p) for name, p in net.up.named_parameters()]
    opt = GuardedOptimizer(
        torch.optim.SGD(net.up.parameters(), lr=0.1), named_parameters=named, group=group
    )
    if way == "fsdp":
        RankWatch(opt, model)
    else:  # DDP accepts one hook permanently, so use a new model
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        RankWatch(opt, model)
    return step(model, opt, {1: NAN}).culprit_rank


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_parameters_outside_the_optimizer_are_ignored(two: Ranks, way: str) -> None:
    assert two.run(partly_optimized, way) == [1, 1]


def watched_twice() -> Any:
    model, opt, first = build("fsdp")
    second = RankWatch(opt, model)
    first.remove()
    assert opt.rank_watch is second
    return step(model, opt, {1: NAN}).culprit_rank


def test_ending_an_old_watch_leaves_the_new_one(two: Ranks) -> None:
    assert two.run(watched_twice) == [1, 1]


def a_sum(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def a_hook_for_shards() -> tuple[str, bool, bool]:
    model, opt, _ = build("fsdp", watched=False)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError) as refused:
        RankWatch(opt, model, comm_hook=a_sum)
    same = hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    return str(refused.value), opt.rank_watch is None, same


def test_a_communication_hook_for_shards_is_an_error_and_changes_nothing(two: Ranks) -> None:
    for message, unwatched, same in two.run(a_hook_for_shards):
        assert "with fully_shard, but comm_hook is only for Distributed" in message
        assert unwatched and same


def overflowing() -> Any:
    model, opt, _ = build("ddp", comm_hook=a_sum)
    # The gradient of `up.bias` is 1.8e38 on each rank.
    record = step(model, opt, {0: 6e37, 1: 6e37})
    return record.action, record.culprit_ranks, ("up.bias", 0, 8, 0) in record.culprits


def test_an_overflow_in_the_reduction_has_no_culprit_rank(two: Ranks) -> None:
    assert two.run(overflowing) == [("skipped", 0, True)] * 2


def test_a_model_without_reduction_is_an_error() -> None:
    model = Net()
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="model is a Net, but RankWatch supports"):
        RankWatch(opt, model)
    with pytest.raises(TypeError, match=r"must be a fastguard\.GuardedOptimizer"):
        RankWatch(opt.optimizer, model)  # type: ignore[arg-type]
    assert opt.rank_watch is None
    assert fastguard.RankWatch is RankWatch
