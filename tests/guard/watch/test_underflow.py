"""`watch=("underflow",)` counts gradients that a narrower format would make subnormal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastguard import GuardedOptimizer
from fastguard.guard.watch.underflow import FORMATS, SAMPLE


def watched_values(*grads: Tensor) -> dict:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    opt = GuardedOptimizer(torch.optim.SGD(parameters, lr=0.1), watch=("underflow",))
    opt.step()
    return opt.records()[0].watch.get("underflow", {})


def test_gradients_that_fp16_would_lose_are_detected_while_training_in_fp32() -> None:
    """Three of four are below 2**-14; one is also below bfloat16's normal numbers."""
    found = watched_values(torch.tensor([1.0, 2.0**-15, -(2.0**-20), 2.0**-130, 0.0]))
    assert found["float16"] == found["float8_e5m2"] == 0.75
    assert found["bfloat16"] == 0.25
    assert found["float8_e4m3fn"] == 0.75
    assert found["exponents"] == {"-127": 1, "-20": 1, "-15": 1, "0": 1}


@pytest.mark.parametrize("name", FORMATS)
def test_the_smallest_normal_number_of_a_format_is_not_lost(name: str) -> None:
    smallest = torch.finfo(getattr(torch, name)).smallest_normal
    assert watched_values(torch.tensor([smallest, -smallest, 1.0]))[name] == 0.0
    assert watched_values(torch.tensor([smallest * 0.99, 1.0]))[name] == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_is_counted(dtype: torch.dtype) -> None:
    found = watched_values(torch.tensor([1.0, 0.75, 2.0**-7, 0.0], dtype=dtype))
    assert found["exponents"] == {"-7": 1, "-1": 1, "0": 1}
    assert found["float8_e4m3fn"] == pytest.approx(1 / 3)


def test_zeros_or_missing_gradients_give_no_entry() -> None:
    assert watched_values(torch.zeros(3)) == {}
    assert watched_values(torch.tensor([math.nan, math.inf])) == {}


def test_a_sample_of_a_large_model_is_counted() -> None:
    """One eighth of the rows is tiny; the sampled share agrees within four standard errors."""
    grad = torch.ones(4096, 512)
    grad[::8] = 1e-6
    found = watched_values(grad, torch.ones(3))
    n = sum(found["exponents"].values())
    assert SAMPLE // 2 < n <= SAMPLE + 2
    assert abs(found["float16"] - 0.125) < 4 * 0.5 / math.sqrt(n)
