"""A replay restores model, batch, gradients and random number generators."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastguard import explain_nonfinite
from fastguard.checkpoints.random_state import random_state
from guardtest.chains import Call, SegNet, mean

NAN = math.nan


class Restless(nn.Module):
    """Changes everything that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.last: Tensor | None = None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + 1
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        x.add_(random.random() + np.random.rand())
        self.last = self.drop(self.linear(self.norm(x)))
        self.train(not self.training)
        return self.last.log()


def test_all_state_is_restored():
    model, x = Restless(), torch.randn(8, 4)
    model.linear.weight.grad = torch.full((4, 4), NAN)
    gradient, seen = model.linear.weight.grad, model.seen
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    inputs, generators = x.clone(), random_state()
    report = explain_nonfinite(model, (x, None), mean)
    assert report.operation == "aten.log.default"
    assert (model.calls, model.last, model.training) == (0, None, True)
    assert model.seen is seen and model.linear.weight.grad is gradient
    assert model.linear.bias.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert torch.equal(x, inputs)
    torch.testing.assert_close(random_state(), generators, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_all_state_is_restored_when_the_model_raises():
    def fail(x):
        torch.rand(3)
        raise RuntimeError("out of ideas")

    model = nn.Sequential(nn.BatchNorm1d(4), Call(fail))
    batch = torch.randn(8, 4), None
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of ideas"):
        explain_nonfinite(model, batch, mean)
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_replay_with_rng_uses_the_random_numbers_of_the_bad_batch():
    """This batch fails only if dropout drops all four units, so that their sum is 0."""
    model = nn.Sequential(nn.Dropout(0.5), Call(lambda x: x / x.sum(-1, keepdim=True)))
    batch = torch.ones(1, 4), None

    def healthy(seed: int) -> bool:
        torch.manual_seed(seed)
        return bool(model(batch[0]).isfinite().all())

    bad = next(seed for seed in range(999) if not healthy(seed))
    torch.manual_seed(bad)
    before = random_state()
    torch.manual_seed(next(seed for seed in range(999) if healthy(seed)))
    assert not explain_nonfinite(model, batch, mean).found
    report = explain_nonfinite(model, batch, mean, rng=before)
    assert report.operation == "aten.div.Tensor"
    assert str(explain_nonfinite(model, batch, mean, rng=before)) == str(report)


def test_an_existing_graph_stays_usable():
    model = SegNet()
    x = torch.randn(2, 3, 8, 8)
    loss = model(x).mean()
    explain_nonfinite(model.eval(), (x, None), mean)
    loss.backward()


def test_post_accumulate_hooks_do_not_fire():
    model = nn.Linear(2, 2)
    fired = []
    model.weight.register_post_accumulate_grad_hook(fired.append)
    explain_nonfinite(model, (torch.zeros(1, 2), None), mean)
    assert fired == []
