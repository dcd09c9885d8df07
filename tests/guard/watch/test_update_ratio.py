"""`watch=("update_ratio",)`: layers that change too much, or not at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastguard.optim
from fastguard import GuardedOptimizer


def test_a_layer_with_a_learning_rate_100_times_too_large_is_detected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    groups = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": model[2].parameters(), "lr": 1e-2},  # the error
    ]
    opt = GuardedOptimizer(
        torch.optim.AdamW(groups),
        named_parameters=model.named_parameters(),
        watch=("update_ratio",),
        watch_every=1,
    )
    model(torch.randn(8, 32)).square().sum().backward()
    opt.step()
    ratios = opt.records()[0].watch["update_ratio"]
    assert ratios["0.weight"] == pytest.approx(1e-3, rel=0.2)
    assert ratios["2.weight"] == pytest.approx(1e-1, rel=0.2)


@pytest.mark.parametrize(
    ("dtype", "flat"),
    [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True), (torch.float64, True)],
    ids=str,
)
def test_the_ratio_is_the_update_over_the_weight(dtype: torch.dtype, flat: bool) -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    opt = GuardedOptimizer(
        torch.optim.SGD([p], lr=0.5), max_norm=1.0, watch=("update_ratio",), flat_parameters=flat
    )
    p.grad = torch.tensor([0.0, 8.0], dtype=dtype)
    opt.step()
    assert opt.records()[0].watch["update_ratio"] == pytest.approx({"parameter 0": 0.1}, rel=1e-2)


def test_a_skipped_step_has_no_ratio() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.5), watch=("update_ratio",))
    p.grad = torch.tensor([math.inf, 1.0])
    opt.step()
    assert opt.records()[0].watch == {}


def test_a_weight_of_zero_has_no_ratio() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = GuardedOptimizer(torch.optim.SGD([p], lr=0.5), watch=("update_ratio",))
    p.grad = torch.ones(2)
    opt.step()
    assert opt.records()[0].watch == {"update_ratio": {}, "weight_norm": {"parameter 0": 0.0}}


def test_the_norm_of_each_weight_before_the_update() -> None:
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor(-2.0))]
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.5), watch=("update_ratio",))
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.records()[0].watch["weight_norm"] == {"parameter 0": 5.0, "parameter 1": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_an_update_makes_nonfinite_are_counted_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    opt = GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=3e38),
        named_parameters=model.named_parameters(),
        watch=("update_ratio",),
        watch_every=1,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    model[1].weight.grad.view(-1)[:4] = 100.0
    model[1].bias.grad[1] = -100.0
    opt.step()
    first, second = (record.watch for record in opt.records())
    assert "nonfinite_weights" not in first
    assert second["nonfinite_weights"] == {"1.weight": 4, "1.bias": 1}


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_the_ratio_is_that_of_the_exact_weights(master: str) -> None:
    """A step of 1e-4 does not change the bfloat16 weights, but it does change the exact ones."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    inner = fastguard.optim.AdamW([p], lr=1e-4, weight_decay=0.0, master=master)  # type: ignore[arg-type]
    opt = GuardedOptimizer(inner, watch=("update_ratio",), watch_every=1)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert (p == 1.0).all()
    for record in opt.records():
        assert record.watch["update_ratio"]["parameter 0"] == pytest.approx(1e-4, rel=1e-2)
