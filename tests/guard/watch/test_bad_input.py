"""Quantities that cannot be watched are refused in the constructor, with value and remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastguard import GuardConfig, GuardedOptimizer


def guard(optimizer: Any = None, **options: Any) -> GuardedOptimizer:
    p = nn.Parameter(torch.ones(2))
    return GuardedOptimizer(optimizer or torch.optim.SGD([p], lr=0.1), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"watch": ("tensor_norm",)}, ValueError, r"'tensor_norm', .*did you mean 'tensor_norms'"),
        ({"watch": "tensor_norms"}, TypeError, r"watch='tensor_norms' must be a tuple of names"),
        ({"watch": None}, TypeError, r"watch=None must be a tuple of names"),
        ({"watch": (3,)}, TypeError, r"watch holds 3; expected the name of a quantity"),
        ({"watch": ("underflow", "underflow")}, ValueError, r"'underflow' 2 times; pass it once"),
        ({"watch_every": 0}, ValueError, r"watch_every=0 must be None or an integer >= 1"),
        ({"watch_every": 2.5}, ValueError, r"watch_every=2.5 must be None or an integer >= 1"),
        (
            {"watch": ("replica_drift",)},
            ValueError,
            r"there is no group; pass group=fastguard",
        ),
        ({"watch": ("noise_scale",)}, ValueError, r"there is no group; pass group=fastguard"),
    ],
)
def test_a_quantity_that_cannot_be_watched_is_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        guard(**options)


def test_update_ratio_is_refused_for_optimizers_that_step_before_the_decision() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError,
        match=r"LBFGS evaluates a closure in the middle of its step.*remove 'update_ratio'",
    ):
        guard(torch.optim.LBFGS([p]), watch=("update_ratio",))
    opt = guard(torch.optim.LBFGS([p]), watch=("tensor_norms",))

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert list(opt.records()[0].watch["tensor_norms"]) == ["parameter 0"]


def test_a_configuration_can_set_what_to_watch() -> None:
    config = GuardConfig.from_dict({"guard": {"watch": ["underflow"], "watch_every": 7}})
    model = nn.Linear(2, 1)
    opt = config.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (opt.watch, opt.watch_every) == (("underflow",), 7)
    with pytest.raises(ValueError, match=r"guard.*'tensor_norm'.*did you mean 'tensor_norms'"):
        GuardConfig.from_dict({"guard": {"watch": ["tensor_norm"]}})
    with pytest.raises(ValueError, match=r"guard.*watch_every=0"):
        GuardConfig.from_dict({"guard": {"watch_every": 0}})
