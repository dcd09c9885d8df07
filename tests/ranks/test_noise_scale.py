"""`watch="noise_scale"` over ranks, replicated and sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastguard import GuardedOptimizer, RankWatch
from guardtest.rank_guards import net, replicated, same_on_all
from guardtest.ranks import Ranks


def noisy(scaled: bool) -> list[float | None]:
    """Returns 64 gradient elements of squared norm 4, plus noise of variance 1 on each rank."""
    p = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(p.weight)
    model = DistributedDataParallel(p)
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        **replicated(watch=("noise_scale",)),
    )
    RankWatch(opt, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        opt.zero_grad()
        x = 0.25 + torch.randn(1, 64, generator=generator)
        scaler.scale(model(x).sum()).backward()
        if scaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return [r.watch.get("noise_scale") for r in opt.records()]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_the_noise_scale_estimates_the_useful_batch_size(four: Ranks, scaled: bool) -> None:
    """tr(S) is 64 for the gradient of one rank, so 16 for four ranks; 16 / 4 = 4."""
    scales = same_on_all(four.run(noisy, scaled))
    late = [scale for scale in scales[50:] if scale is not None]
    assert len(late) > 140
    assert sum(late) / len(late) == pytest.approx(4.0, rel=0.25)


def noisy_in_two_runs(break_at: int | None) -> list[float | None]:
    """Returns the noise scale of 40 steps; a new guard resumes at `break_at`."""
    p = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(p.weight)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def guarded() -> tuple[GuardedOptimizer, nn.Module]:
        model = DistributedDataParallel(p)
        opt = GuardedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), **replicated(watch=("noise_scale",))
        )
        RankWatch(opt, model)
        return opt, model

    (opt, model), told = guarded(), []
    for step in range(40):
        if step == break_at:
            told += opt.records()
            state = opt.state_dict()
            opt, model = guarded()
            opt.load_state_dict(state)
        opt.zero_grad()
        model(0.25 + torch.randn(1, 64, generator=generator)).sum().backward()
        opt.step()
    return [r.watch.get("noise_scale") for r in [*told, *opt.records()]]


def test_the_averages_of_the_noise_scale_are_part_of_the_state_dict(four: Ranks) -> None:
    through = same_on_all(four.run(noisy_in_two_runs, None))
    assert same_on_all(four.run(noisy_in_two_runs, 20)) == through
    assert len([scale for scale in through if scale is not None]) > 20


def sharded_noise() -> list[float | None]:
    """Like `noisy`, with a module sharded by FSDP2."""
    model = nn.Sequential(nn.Linear(64, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    mesh = init_device_mesh("cpu", (4,))
    # this dtype: see `fastguard.errors.versions.FSDP_MEANS_ON_CPU`
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        watch=("noise_scale",),
        watch_every=1,
    )
    RankWatch(opt, model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(200):
        opt.zero_grad()
        model(0.25 + torch.randn(1, 64, generator=generator)).sum().backward()
        opt.step()
    return [r.watch.get("noise_scale") for r in opt.records()]


def test_the_noise_scale_of_a_sharded_model(four: Ranks) -> None:
    scales = same_on_all(four.run(sharded_noise))
    late = [scale for scale in scales[50:] if scale is not None]
    assert len(late) > 140
    assert sum(late) / len(late) == pytest.approx(4.0, rel=0.25)


def without_rank_watch() -> str:
    model = DistributedDataParallel(net())
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), **replicated(watch=("noise_scale",))
    )
    try:
        opt.step()
    except ValueError as error:
        return str(error)
    return ""


def test_the_noise_scale_needs_a_rank_watch(four: Ranks) -> None:
    assert "create a fastguard.RankWatch(opt, model)" in same_on_all(four.run(without_rank_watch))
