"""The DeepSpeed recipe of docs/recipes.md in the real engine: stage 0, one process, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

import fastguard
from guardtest import require
from guardtest.gloo_groups import group_of_one
from guardtest.training import assert_same_bits


class ForDeepSpeed(fastguard.GuardedOptimizer):
    """The class of docs/recipes.md."""

    @property
    def overflow(self):
        return self.last is not None and bool(self.last.found_inf)


@pytest.fixture(scope="module")
def deepspeed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        module = require("deepspeed")
        # DeepSpeed compiles its collectives in shared memory at the first use, which takes minutes.
        patch.setitem(module.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        with group_of_one():
            yield module


def train(deepspeed, losses, optimizer, **config):
    """Returns the engine and its scheduler after steps with losses multiplied by `losses`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    opt = optimizer(model)
    lr = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
    config = {"train_micro_batch_size_per_gpu": 4} | config
    engine, *_ = deepspeed.initialize(model=model, optimizer=opt, lr_scheduler=lr, config=config)
    for i, factor in enumerate(losses):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, 8, generator=generator)
        if factor is None:  # the batch is left out
            continue
        loss = engine(x).square().mean() * factor
        engine.backward(loss)
        if isinstance(opt, fastguard.GuardedOptimizer):
            opt.observe(loss)
        engine.step()
    return engine, lr, opt


def guarded(model):
    return ForDeepSpeed(
        torch.optim.AdamW(model.parameters(), lr=0.1),
        max_norm=1e3,
        named_parameters=model.named_parameters(),
    )


def plain(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_a_run_with_a_bad_batch_ends_like_a_run_without_it(deepspeed):
    """Checks weights, optimizer state and schedule; DeepSpeed counts the step as skipped."""
    ours, our_lr, opt = train(deepspeed, [1.0, math.nan, 1.0, 1.0], guarded)
    theirs, their_lr, bare = train(deepspeed, [1.0, None, 1.0, 1.0], plain)
    assert_same_bits(ours.module.state_dict(), theirs.module.state_dict())
    for mine, their in zip(opt.state.values(), bare.state.values(), strict=True):
        assert_same_bits(mine, their)
    assert our_lr.last_epoch == their_lr.last_epoch == 3
    assert (ours.skipped_steps, opt.skipped_steps) == (1, 1)
    assert opt.records()[1].culprits[0][0] == "0.weight"


def test_a_run_without_faults_matches_plain_deepspeed(deepspeed):
    """If nothing is clipped, they are bitwise equal."""
    ours, *_ = train(deepspeed, [1.0] * 3, guarded)
    theirs, *_ = train(deepspeed, [1.0] * 3, plain, gradient_clipping=1e3)
    assert_same_bits(ours.module.state_dict(), theirs.module.state_dict())


def test_clipped_steps_match_within_rounding(deepspeed):
    def clipping(model):
        return ForDeepSpeed(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=0.1)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    ours, _, opt = train(deepspeed, [1.0] * 3, clipping)
    theirs, *_ = train(deepspeed, [1.0] * 3, sgd, gradient_clipping=0.1)
    assert {r.action for r in opt.records()} == {"clipped"}
    torch.testing.assert_close(
        dict(ours.module.state_dict()), dict(theirs.module.state_dict()), rtol=1e-5, atol=1e-7
    )
