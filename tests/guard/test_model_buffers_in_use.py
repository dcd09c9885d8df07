"""Buffers are restored despite moves, copies, loads, a rollback, and steps that raise."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard.guard.model_buffers as model_buffers
from fastguard import (
    GuardedOptimizer,
    NonFiniteGradError,
    Rollback,
    TrainingDivergedError,
    protect_buffers,
)
from guardtest.buffer_loop import Loop, buffers_of, same


def test_a_moved_model_is_restored() -> None:
    loop = Loop(nn.BatchNorm1d(4))
    protect_buffers(loop.model, loop.opt)
    loop.batch(0)
    kept = loop.model[1].running_mean.clone()
    loop.model[1].to(torch.float64).to(torch.float32)  # replaces every buffer
    loop.batch(1, bad=True)
    assert torch.equal(loop.model[1].running_mean, kept)
    loop.batch(2)
    assert not torch.equal(loop.model[1].running_mean, kept)


def test_a_graph_that_waits_for_its_backward_pass_stays_valid() -> None:
    """One forward pass has two losses, with a skipped step between their backward passes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    opt = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    protect_buffers(model, opt)
    model.eval()
    out = model(torch.randn(8, 4))
    opt.step(loss=math.nan)
    out.sum().backward()
    assert model[0].weight.grad is not None


def test_the_protection_follows_two_optimizers_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    first, second = (GuardedOptimizer(torch.optim.SGD(part.parameters(), lr=0.1)) for part in model)
    buffers = protect_buffers(model, first)
    buffers.follow(second)
    assert model_buffers.are_protected(second)
    for opt in (first, second):
        model(torch.full((8, 4), math.nan)).sum()
        opt.step(loss=math.nan)
        assert model[1].running_mean.isfinite().all()
    buffers.remove()
    assert not model_buffers.are_protected(first)
    model(torch.full((8, 4), math.nan)).sum()
    first.step(loss=math.nan)
    assert model[1].running_mean.isnan().all()


def test_loaded_buffers_are_the_ones_restored_later() -> None:
    trained = Loop(nn.BatchNorm1d(4))
    for i in range(5):
        trained.batch(i)
    loop = Loop(nn.BatchNorm1d(4))
    buffers = protect_buffers(loop.model, loop.opt)
    loop.model.load_state_dict(trained.model.state_dict())
    loop.opt.load_state_dict(trained.opt.state_dict())
    loop.batch(9, bad=True)
    assert same(buffers_of(loop.model), buffers_of(trained.model))
    loop.opt.load_state_dict(trained.opt.state_dict())
    loop.model[1].reset_running_stats()
    buffers.keep()
    loop.batch(9, bad=True)
    assert not loop.model[1].running_mean.any()


def test_the_protection_works_with_a_rollback() -> None:
    loop = Loop(nn.BatchNorm1d(4))
    protect_buffers(loop.model, loop.opt)
    rollback = Rollback(loop.opt, {"model": loop.model}, every=2, after_skips=2)
    for i in range(2):
        loop.batch(i)
        rollback.step(i)
    kept = buffers_of(loop.model)
    for i in range(2, 5):
        loop.batch(i, bad=i > 2)
        rewind = rollback.step(i)
    assert rewind is not None and rewind.step == 2
    loop.batch(5, bad=True)
    assert same(buffers_of(loop.model), kept)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_with_its_model_refers_to_the_copy(duplicate) -> None:
    loop = Loop(nn.BatchNorm1d(4))
    buffers = protect_buffers(loop.model, loop.opt)
    loop.batch(0)
    model, twin = duplicate((loop.model, buffers))
    with torch.no_grad():
        model[1].running_mean.fill_(math.nan)
    twin.put_back()
    assert torch.equal(model[1].running_mean, loop.model[1].running_mean)
    torch.save(loop.model, io.BytesIO())  # the model has no reference to the protection


@pytest.mark.parametrize(
    ("guard", "error"),
    [
        ({"nonfinite": "raise"}, NonFiniteGradError),
        ({"max_consecutive_skips": 1}, TrainingDivergedError),
    ],
    ids=["raise", "budget"],
)
def test_buffers_are_restored_if_the_guard_raises(guard: dict, error: type[Exception]) -> None:
    loop = Loop(nn.BatchNorm1d(4), **guard)
    protect_buffers(loop.model, loop.opt)
    loop.batch(0)
    kept = buffers_of(loop.model)
    with pytest.raises(error):  # in the second step at the latest
        for i in (1, 2):
            loop.batch(i, bad=True)
    assert same(buffers_of(loop.model), kept)
    assert loop.evaluation().isfinite().all()


def test_a_step_that_is_interrupted_may_be_tried_again() -> None:
    loop = Loop(nn.BatchNorm1d(4), fused=False)
    protect_buffers(loop.model, loop.opt)
    fail = loop.opt.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.batch(0)
    fail.remove()
    left = buffers_of(loop.model)
    loop.opt.step()
    assert same(buffers_of(loop.model), left)
    assert loop.model[1].num_batches_tracked == 1


@pytest.mark.parametrize("bad", [False, True], ids=["applied", "skipped"])
def test_a_step_that_raises_after_it_was_taken_settles_the_buffers(bad: bool) -> None:
    loop, other = (Loop(nn.BatchNorm1d(4), fused=False) for _ in range(2))
    protect_buffers(other.model, other.opt)
    # Runs before the hook that settles the buffers.
    fail = loop.opt.register_step_post_hook(lambda *_: 1 / 0)
    protect_buffers(loop.model, loop.opt)
    other.batch(0, bad)
    with pytest.raises(ZeroDivisionError):
        loop.batch(0, bad)
    fail.remove()
    assert loop.opt.steps_taken == 1
    assert same(buffers_of(loop.model), buffers_of(other.model))
    other.batch(1, bad=True)
    loop.batch(1, bad=True)
    assert same(buffers_of(loop.model), buffers_of(other.model))
