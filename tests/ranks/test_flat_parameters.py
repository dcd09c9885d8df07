"""Flat parameters work under DDP on two ranks; under FSDP they are refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastguard
from fastguard import GuardedOptimizer
from guardtest.ranks import Ranks

STEPS, BAD_STEP = 6, 3


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(flat: bool, views: bool, guard_first: bool) -> tuple[list[Tensor], int]:
    """Returns weights and skip count after steps, one of them with a NaN on rank 1."""
    model = net()

    def guarded() -> GuardedOptimizer:
        inner = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        group = fastguard.Replicated(dist.group.WORLD)
        return GuardedOptimizer(inner, max_norm=0.1, flat_parameters=flat, group=group)

    opt = guarded() if guard_first else None
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
    opt = opt or guarded()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        opt.zero_grad()
        loss = ddp(torch.randn(4, 6, generator=generator)).square().mean()
        loss.backward()
        bad = step == BAD_STEP and dist.get_rank() == 1
        opt.step(loss=loss * math.nan if bad else loss)
    weights = [p.detach().clone() for p in model.parameters()]
    if flat:
        assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    return weights, opt.skipped_steps


@pytest.mark.parametrize("guard_first", [False, True], ids=["", "guard_first"])
@pytest.mark.parametrize("views", [False, True], ids=["", "bucket_views"])
def test_ddp_trains_as_without_flat_parameters(two: Ranks, views: bool, guard_first: bool) -> None:
    flat = two.run(trained, True, views, guard_first)
    plain = two.run(trained, False, views, guard_first)
    for (weights, skipped), (expected, _) in zip(flat, plain, strict=True):
        assert skipped == 1
        for ours, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    for ours, theirs in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(ours, theirs)


def refusal(kind: str) -> str:
    if kind == "fsdp2":
        model = net()
        fully_shard(model)
    else:
        options = {"device_id": torch.device("cpu"), "use_orig_params": kind == "orig"}
        model = FullyShardedDataParallel(net(), **options)
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    group = None if kind == "fsdp2" else dist.group.WORLD
    try:
        GuardedOptimizer(inner, flat_parameters=True, group=group)
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["fsdp1", "orig", "fsdp2"])
def test_fsdp_is_an_error(two: Ranks, kind: str) -> None:
    for message in two.run(refusal, kind):
        assert "is a shard of FSDP or DeepSpeed, which is already flat" in message
