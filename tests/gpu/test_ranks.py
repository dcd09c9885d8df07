"""Ranks with GPUs: NCCL if there are two GPUs, otherwise gloo with two ranks on one GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastguard
from fastguard import GuardedOptimizer, SpikeRule
from guardtest.ranks import Ranks, collectives


@pytest.fixture(scope="module", params=["nccl", "gloo"])
def two(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each rank, and this machine has one")
    with Ranks(2, backend=request.param) as ranks:
        yield ranks


def model_of(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(device)


def batch_of(step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator).to(device)


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def whole(t: Tensor) -> Tensor:
    """Gathers a tensor on the host, because gloo cannot gather the shards of a GPU."""
    if not isinstance(t, DTensor):
        return t.cpu()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, t.to_local().cpu())
    return torch.cat(parts)


def train(model: nn.Module, opt: GuardedOptimizer, part: slice, bad_rank: int | None) -> list[Any]:
    """Takes six steps; in the fourth, the gradients of one rank contain a NaN."""
    for step in range(6):
        opt.zero_grad()
        loss = model(batch_of(step, here())[part]).square().mean()
        loss.backward()
        if step == 3 and bad_rank in (None, dist.get_rank() if dist.is_initialized() else None):
            grad = next(model.parameters()).grad
            getattr(grad, "_local_tensor", grad).view(-1)[0] = math.nan
        opt.step(loss=loss, tag=step)
    weights = [whole(p.detach()) for p in model.parameters()]
    return [opt.flush(), weights]


def guarded(model: nn.Module, **options: Any) -> GuardedOptimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return GuardedOptimizer(inner, max_norm=0.1, spike=SpikeRule(window=4, warmup=2), **options)


def sharded() -> list[Any]:
    device = here()  # before the mesh, which would choose the GPU with the number of the rank
    model = fully_shard(model_of(device), mesh=init_device_mesh("cuda", (2,)))
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    return train(model, guarded(model), part, bad_rank=1)


def test_shards_take_the_same_steps_as_one_gpu(two: Ranks) -> None:
    model = model_of(here())
    expected, weights = train(model, guarded(model), slice(None), bad_rank=None)
    for records, mine in two.run(sharded):
        assert [r.action for r in records] == [r.action for r in expected]
        assert [r.culprit_rank for r in records] == [None] * 3 + [1] + [None] * 2
        for ours, theirs in zip(records, expected, strict=True):
            assert ours.losses["loss"] == pytest.approx(theirs.losses["loss"], rel=1e-5)
        for ours, theirs in zip(mine, weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def loss_of_the_last_stage() -> list[tuple[Any, ...]]:
    """Takes steps with plain tensors that differ by rank; only one rank knows the loss."""
    p = nn.Parameter(torch.zeros(3, device=here()))
    inner = torch.optim.AdamW([p], fused=True)
    rule = SpikeRule(window=4, warmup=2, sigma=3.0)
    opt = GuardedOptimizer(inner, spike={"ce": rule}, group=dist.group.WORLD)
    for loss in (1.0, 1.1, 0.9, 60.0, math.nan, 1.0):
        p.grad = torch.full_like(p, 1.0 + dist.get_rank())
        given = {"ce": torch.tensor(loss, device=here()), "more": 2.0}
        opt.step(loss=given if dist.get_rank() == 1 else None)
    return [(r.action, r.reason, repr(r.losses), r.total_norm) for r in opt.flush()]


def test_a_loss_that_only_one_rank_knows(two: Ranks) -> None:
    first, second = two.run(loss_of_the_last_stage)
    assert first == second
    assert [action for action, *_ in first] == ["applied"] * 3 + ["skipped"] * 2 + ["applied"]
    assert [reason for _, reason, *_ in first][3:5] == ["loss_spike", "nonfinite_loss"]
    assert first[0][2:] == ("{'ce': 1.0, 'more': 2.0}", pytest.approx(math.sqrt(15)))


def without_waiting() -> list[tuple[str, int]]:
    model = model_of(here())
    opt = guarded(model, group=fastguard.Replicated(dist.group.WORLD))
    losses = torch.ones(3, device=here())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step(loss=losses[0])  # creates tables and exchanges names
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with collectives() as seen:
            opt.step(loss=losses[1])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return seen


def test_a_step_with_nccl_does_not_wait(two: Ranks) -> None:
    if two.backend != "nccl":
        pytest.skip("gloo copies to the host")
    assert two.run(without_waiting) == [[("allreduce_", 248)]] * 2
