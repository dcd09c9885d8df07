"""`watch=("update_ratio",)`: layers that change too much, or not at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

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
    assert opt.records()[0].watch == {"update_ratio": {}}
