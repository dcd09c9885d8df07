"""Shapes, activations and the modes of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import around, mlp, regression


@case("forward-raises", "error", "forward", where="2 (Linear)", says="mat1 and mat2")
def forward_raises(faulty: bool) -> Setup:
    return regression(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(9 if faulty else 8, 1)))


@case("shape-mismatch", "error", "forward", says="output [2, 1, 4, 4] and target [2, 1, 7, 7]")
def shape_mismatch(faulty: bool) -> Setup:
    target = torch.rand(2, 1, 7, 7) if faulty else torch.rand(2, 1, 4, 4)
    batch = torch.randn(2, 3, 4, 4), target
    return {"model": nn.Conv2d(3, 1, 1), "batch": batch, "loss_fn": nn.BCEWithLogitsLoss()}


@case("silent-broadcast", "error", "forward", says="[8, 1] and target [8] to [8, 8]")
def silent_broadcast(faulty: bool) -> Setup:
    inputs = torch.randn(8, 4)
    targets = inputs.sum(1)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (((output if faulty else output.squeeze(1)) - targets) ** 2).mean()

    return regression() | {"batch": (inputs, targets), "loss_fn": loss}


@case("nonfinite-activation", "error", "forward", where="1 (Between)", says="aten.log.default")
def nonfinite_activation(faulty: bool) -> Setup:
    return regression(around(lambda x: (x if faulty else x.abs() + 1e-6).log()))


@case("ignored-nonfinite", "warning", "forward", where="1 (Between)")
def ignored_nonfinite(faulty: bool) -> Setup:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = around(lambda x: (x.detach() if faulty else x.detach().abs() + 1).log())

        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0](x)
            logs = self.parts[1](first)
            return self.parts[2](torch.where(logs.isfinite(), logs, 0.0) + first)

    return regression(Selects())


@case("extreme-activation", "warning", "forward", where="1 (Between)")
def extreme_activation(faulty: bool) -> Setup:
    return regression(around(lambda x: x * (1e6 if faulty else 1.0)))


@case("saturated", "warning", "forward", where="1 (Between)", says="the tanh")
def saturated(faulty: bool) -> Setup:
    return regression(around(lambda x: torch.tanh(x * (1e3 if faulty else 1.0))))


@case("resized-output", "note", "forward", says="accepts this")
def resized_output(faulty: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(functional.interpolate(output, target.shape[-2:]), target)

    target = torch.rand(2, 1, 8, 8) if faulty else torch.rand(2, 1, 4, 4)
    return {"model": nn.Conv2d(3, 1, 1), "batch": (torch.randn(2, 3, 4, 4), target)} | {
        "loss_fn": loss
    }


@case("eval-mode", "note", "forward")
def eval_mode(faulty: bool) -> Setup:
    return regression(mlp(4, 16, 1).train(not faulty))
