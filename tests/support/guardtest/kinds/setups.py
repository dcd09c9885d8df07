"""Setups without problems; a case adds one fault."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def regression(model: nn.Module | None = None, n: int = 8, **more: Any) -> Setup:
    """A setup without problems, apart from the given changes."""
    model = mlp(4, 16, 1) if model is None else model
    inputs = torch.randn(n, 4)
    setup = {"model": model, "batch": (inputs, inputs[:, :1] * 2), "loss_fn": functional.mse_loss}
    return setup | more


def classification(labels: Tensor | None = None, **more: Any) -> Setup:
    labels = torch.arange(8) % 3 if labels is None else labels
    batch = (torch.randn(8, 4), labels)
    return {"model": mlp(4, 16, 3), "batch": batch, "loss_fn": nn.CrossEntropyLoss()} | more


def with_sgd(setup: Setup, **settings: Any) -> Setup:
    parameters = setup["model"].parameters()
    return setup | {"optimizer": torch.optim.SGD(parameters, **({"lr": 0.01} | settings))}


class Between(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def around(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), Between(function), nn.Linear(16, 1))
