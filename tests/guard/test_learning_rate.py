"""The learning rate in a record, for learning rates of any type."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastguard import GuardedOptimizer

NAN = float("nan")


def one_parameter():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p


class OwnRate(torch.optim.Optimizer):
    def __init__(self, parameters, **defaults):
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad


class Unreadable:
    def __float__(self):
        raise ZeroDivisionError


NO_RATES = {
    "unreadable": Unreadable(),
    "none": None,
    "word": "1e-3",
    "bytes": bytearray(b"1"),
    "flag": True,
    "function": lambda step: 0.1,
    "pair": (0.1, 0.2),
    "complex": 1j,
    "rows": torch.tensor([0.1, 0.2]),
    "huge": 10**400,
}


RATES = {
    "float": 0.25,
    "tensor": torch.tensor(0.25),
    "integer": 2,
    "numpy": np.float32(0.25),
    "fraction": Fraction(1, 4),
    "of one": torch.tensor([0.25]),
}


@pytest.mark.parametrize("lr", NO_RATES.values(), ids=NO_RATES)
def test_a_learning_rate_that_is_not_a_number_is_nan_in_the_record(lr):
    p = one_parameter()
    opt = GuardedOptimizer(OwnRate([p], lr=lr))
    opt.step()
    p.grad = torch.tensor([NAN, 1.0])
    opt.step()
    good, bad = opt.records()
    assert math.isnan(good.lr) and math.isnan(bad.lr)
    assert (opt.applied_steps, opt.skipped_steps) == (1, 1)
    assert p.tolist() == pytest.approx([0.9, 0.9])
    assert "lr nan" in str(bad)


@pytest.mark.parametrize("lr", RATES.values(), ids=RATES)
def test_a_learning_rate_that_is_a_number_of_any_kind(lr):
    opt = GuardedOptimizer(OwnRate([one_parameter()], lr=lr))
    opt.step()
    assert opt.records()[0].lr == float(lr)


def test_an_optimizer_without_param_groups():
    opt = GuardedOptimizer(torch.optim.SGD([one_parameter()], lr=0.1))
    del opt.param_groups[0]
    opt.step()
    assert math.isnan(opt.records()[0].lr)
