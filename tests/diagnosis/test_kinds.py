"""Every kind of finding: a setup in which it is seen, and the same one repaired, in which it isn't.

A case makes both: `sick=True` has the defect, `sick=False` differs from it in the defect alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import diagnose
from fastguard.diagnosis import KINDS, Severity

Setup = dict[str, Any]


@dataclass(frozen=True)
class Case:
    make: Callable[[bool], Setup]
    severity: Severity
    check: str
    where: str
    says: str


CASES: dict[str, Case] = {}


def case(kind: str, severity: Severity, check: str, where: str = "", says: str = "") -> Any:
    """Registers a case, and what its finding must tell."""

    def register(make: Callable[[bool], Setup]) -> Callable[[bool], Setup]:
        CASES[kind] = Case(make, severity, check, where, says)
        return make

    return register


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ok"])
def test_a_kind_is_seen(kind: str) -> None:
    case = CASES[kind]
    found = diagnose(**case.make(True)).of(kind)
    assert found, f"{kind} is not seen"
    assert (found[0].severity, found[0].check) == (case.severity, case.check)
    assert case.where in found[0].where
    assert case.says in found[0].seen
    assert found[0].remedy or found[0].severity == "note"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ok"])
def test_a_kind_is_not_seen_where_it_is_not(kind: str) -> None:
    assert diagnose(**CASES[kind].make(False)).of(kind) == []


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def regression(model: nn.Module | None = None, n: int = 8, **more: Any) -> Setup:
    """Sound, but for what is changed afterwards."""
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


# Initialisation.


@case("nonfinite-weight", "error", "initialisation", where="2.bias", says="2.bias (1 NaN)")
def nonfinite_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    if sick:
        nn.init.constant_(model[2].bias, math.nan)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # meant to be so
    return regression(model)


@case("negative-variance", "error", "initialisation", where="1 (BatchNorm1d)")
def negative_variance(sick: bool) -> Setup:
    norm = nn.BatchNorm1d(16)
    norm.running_var[3] = -0.5 if sick else 0.5
    return regression(nn.Sequential(nn.Linear(4, 16), norm, nn.Linear(16, 1)))


@case("extreme-gain", "warning", "initialisation", where="0 (Linear)")
def extreme_gain(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.normal_(model[0].weight, std=10.0 if sick else 1.0)
    return regression(model)


@case("zero-weight", "warning", "initialisation", where="2 (Linear)")
def zero_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.zeros_(model[2].weight if sick else model[2].bias)
    return regression(model)


@case("constant-weight", "warning", "initialisation", where="0 (Linear)", says="0.1")
def constant_weight(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.constant_(model[0].weight if sick else model[0].bias, 0.1)
    return regression(model)


@case("norm-eps", "warning", "initialisation", where="1 (LayerNorm)")
def norm_eps(sick: bool) -> Setup:
    norms = nn.LayerNorm(16, eps=0.0 if sick else 1e-12), nn.RMSNorm(16)  # eps=None: torch's
    return regression(nn.Sequential(nn.Linear(4, 16), *norms, nn.Linear(16, 1)))


# Data.


@case("nonfinite-data", "error", "data", where="inputs", says="1 NaN")
def nonfinite_data(sick: bool) -> Setup:
    setup = regression()
    if sick:
        setup["batch"][0][3, 1] = math.nan
    return setup


@case("range", "warning", "data", where="inputs", says="from 0 to 255")
def data_range(sick: bool) -> Setup:
    setup = regression()
    inputs = torch.randint(1, 255, (8, 4)).float()
    inputs[0, 0], inputs[1, 1] = 0, 255
    return setup | {"batch": (inputs if sick else inputs / 255, setup["batch"][1])}


@case("constant-data", "warning", "data", where="data[1].inputs", says="all 32 elements are 0.5")
def constant_data(sick: bool) -> Setup:
    setup = regression()
    batches = [setup["batch"], (torch.full((8, 4), 0.5), torch.randn(8, 1))]
    return setup | {"data": batches if sick else batches[:1]}


@case("one-label", "warning", "data", where="targets", says="all 16 labels are 2")
def one_label(sick: bool) -> Setup:
    labels = torch.full((16,), 2)
    labels[0] = 2 if sick else 0
    return classification() | {"batch": (torch.randn(16, 4), labels)}


@case("index-out-of-range", "error", "data", where="targets", says="0 to 3, allowed are 0 to 2")
def index_out_of_range(sick: bool) -> Setup:
    labels = torch.tensor([0, 1, 2, 3 if sick else 0, -100, 1, 2, 0])
    return classification(labels)


@case("target-out-of-range", "error", "data", where="targets", says="from 0 to 255")
def target_out_of_range(sick: bool) -> Setup:
    mask = torch.tensor([[0.0], [1.0]] * 4) * (255 if sick else 1)
    inputs = torch.randn(8, 4)
    return regression() | {"batch": (inputs, mask), "loss_fn": nn.BCEWithLogitsLoss()}


@case("duplicates", "warning", "data", where="batch", says="2 of 8")
def duplicates(sick: bool) -> Setup:
    setup = classification()
    inputs, labels = setup["batch"]
    if sick:
        inputs[5:7], labels[5:7] = inputs[1], labels[1]
        return setup
    return setup | {"data": [setup["batch"]]}  # the batch is no copy of itself


@case("contradicting-labels", "warning", "data", where="data", says="1 of 16 samples")
def contradicting_labels(sick: bool) -> Setup:
    batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
    batches[1][0][0] = batches[0][0][0]
    batches[1][1][0] = 1 if sick else 0
    return classification(data=batches)


# Forward.


@case("forward-raises", "error", "forward", where="2 (Linear)", says="mat1 and mat2")
def forward_raises(sick: bool) -> Setup:
    return regression(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(9 if sick else 8, 1)))


@case("shape-mismatch", "error", "forward", says="output [2, 1, 4, 4] and target [2, 1, 7, 7]")
def shape_mismatch(sick: bool) -> Setup:
    target = torch.rand(2, 1, 7, 7) if sick else torch.rand(2, 1, 4, 4)
    batch = torch.randn(2, 3, 4, 4), target
    return {"model": nn.Conv2d(3, 1, 1), "batch": batch, "loss_fn": nn.BCEWithLogitsLoss()}


@case("silent-broadcast", "error", "forward", says="[8, 1] and target [8] to [8, 8]")
def silent_broadcast(sick: bool) -> Setup:
    inputs = torch.randn(8, 4)
    targets = inputs.sum(1)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (((output if sick else output.squeeze(1)) - targets) ** 2).mean()

    return regression() | {"batch": (inputs, targets), "loss_fn": loss}


@case("nonfinite-activation", "error", "forward", where="1 (Between)", says="aten.log.default")
def nonfinite_activation(sick: bool) -> Setup:
    return regression(around(lambda x: (x if sick else x.abs() + 1e-6).log()))


@case("ignored-nonfinite", "warning", "forward", where="1 (Between)")
def ignored_nonfinite(sick: bool) -> Setup:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = around(lambda x: (x.detach() if sick else x.detach().abs() + 1).log())

        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0](x)
            logs = self.parts[1](first)
            return self.parts[2](torch.where(logs.isfinite(), logs, 0.0) + first)

    return regression(Selects())


@case("extreme-activation", "warning", "forward", where="1 (Between)")
def extreme_activation(sick: bool) -> Setup:
    return regression(around(lambda x: x * (1e6 if sick else 1.0)))


@case("saturated", "warning", "forward", where="1 (Between)", says="the tanh")
def saturated(sick: bool) -> Setup:
    return regression(around(lambda x: torch.tanh(x * (1e3 if sick else 1.0))))


@case("resized-output", "note", "forward", says="makes them fit")
def resized_output(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(functional.interpolate(output, target.shape[-2:]), target)

    target = torch.rand(2, 1, 8, 8) if sick else torch.rand(2, 1, 4, 4)
    return {"model": nn.Conv2d(3, 1, 1), "batch": (torch.randn(2, 3, 4, 4), target)} | {
        "loss_fn": loss
    }


@case("eval-mode", "note", "forward")
def eval_mode(sick: bool) -> Setup:
    return regression(mlp(4, 16, 1).train(not sick))


# Loss.


@case("loss-raises", "error", "loss", says="no such weighting")
def loss_raises(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if sick:
            raise KeyError("no such weighting")
        return functional.mse_loss(output, target)

    return regression(loss_fn=loss)


@case("loss-shape", "error", "loss", says="shape [8, 1]")
def loss_shape(sick: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="none" if sick else "mean"))


@case("loss-detached", "error", "loss")
def loss_detached(sick: bool) -> Setup:
    return regression(
        loss_fn=lambda output, target: functional.mse_loss(
            output.detach() if sick else output, target
        )
    )


@case("nonfinite-loss", "error", "loss", where="distance", says="aten.log.default")
def nonfinite_loss(sick: bool) -> Setup:
    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        distance = ((output - output) + (0.0 if sick else 1.0)).log().mean()
        return {"fit": functional.mse_loss(output, target), "distance": distance}

    return regression(loss_fn=loss)


@case("large-loss", "warning", "loss")
def large_loss(sick: bool) -> Setup:
    factor = 1e6 if sick else 1.0
    return regression(loss_fn=lambda output, target: factor * functional.mse_loss(output, target))


@case("loss-parts", "warning", "loss", where="prior")
def loss_parts(sick: bool) -> Setup:
    factor = 1e-6 if sick else 1.0

    def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        prior = factor * (output.square().mean() + 0.1)
        return {"fit": functional.mse_loss(output, target), "prior": prior}

    return regression(loss_fn=loss)


@case("sum-reduction", "warning", "loss")
def sum_reduction(sick: bool) -> Setup:
    return regression(loss_fn=nn.MSELoss(reduction="sum" if sick else "mean"))


# Backward.


@case("backward-raises", "error", "backward", says="modified by an inplace operation")
def backward_raises(sick: bool) -> Setup:
    def overwrite(x: Tensor) -> Tensor:
        y = x.clamp_max(0.0).exp()  # its derivative needs what it gave
        if sick:
            y += 1
        return y

    return regression(around(overwrite))


@case("nonfinite-gradient", "error", "backward", where="1 (Between)", says="SqrtBackward0")
def nonfinite_gradient(sick: bool) -> Setup:
    return regression(around(lambda x: ((x * 0) + (0.0 if sick else 1.0)).sqrt() + x))


@case("all-gradients-zero", "error", "backward")
def all_gradients_zero(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    return regression(nn.Sequential(model, Between(lambda y: y.clamp(7, 8) if sick else y)))


@case("no-gradient", "error", "backward", where="extra", says="2 of 6 parameters")
def no_gradient(sick: bool) -> Setup:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x) + (0.0 if sick else self.extra(x))

    return regression(TwoHeads())


@case("zero-gradient", "warning", "backward", where="0.weight")
def zero_gradient(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    nn.init.constant_(model[0].bias, -100.0 if sick else 0.0)  # every ReLU is dead
    return regression(model)


@case("vanishing-gradient", "warning", "backward", where="0.weight", says="over 12 layers")
def vanishing_gradient(sick: bool) -> Setup:
    model = mlp(4, *[16] * 11, 1, activation=nn.Sigmoid)
    if not sick:
        model = mlp(4, *[16] * 11, 1, activation=nn.SiLU)
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
    return regression(model)


@case("exploding-gradient", "warning", "backward")
def exploding_gradient(sick: bool) -> Setup:
    model = mlp(4, *[16] * 5, 1)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=1.0 if sick else 0.3)
    return regression(model)


# Precision.


@case("float16-range", "error", "precision", where="0 (Linear)", says="not the model")
def float16_range(sick: bool) -> Setup:
    autocast = torch.autocast("cpu", torch.float16 if sick else torch.bfloat16)
    model = nn.Sequential(nn.Linear(4, 16), Between(lambda x: x * 1e-5), nn.Linear(16, 1))
    nn.init.constant_(model[0].bias, 1e5)
    return regression(model, autocast=autocast)


@case("float16-overflow", "warning", "precision", where="1 (Between)", says="65504")
def float16_overflow(sick: bool) -> Setup:
    return regression(around(lambda x: x * (1e6 if sick else 1e3)))


@case("float16-underflow", "note", "precision")
def float16_underflow(sick: bool) -> Setup:
    factor = 1e-9 if sick else 1.0
    return regression(loss_fn=lambda output, target: factor * functional.mse_loss(output, target))


@case("precision-loss", "warning", "precision", says="bfloat16")
def precision_loss(sick: bool) -> Setup:
    # A difference of large numbers: bfloat16 has eight bits of each.
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            large = self.layer(x) + (300.0 if sick else 0.0)
            if torch.is_autocast_enabled("cpu"):
                large = large.bfloat16()
            return large.float() - (300.0 if sick else 0.0)

    return regression(Difference(), autocast=torch.autocast("cpu", torch.bfloat16))


@case("rounded-update", "warning", "precision", where="weight", says="bfloat16")
def rounded_update(sick: bool) -> Setup:
    setup = regression(nn.Linear(4, 1))
    if sick:
        setup["model"].bfloat16()
        setup["batch"] = tuple(t.bfloat16() for t in setup["batch"])
    return with_sgd(setup, lr=1e-5)


# Optimizer.


@case("foreign-optimizer", "error", "optimizer")
def foreign_optimizer(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    other = mlp(4, 16, 1)
    return regression(
        model, optimizer=torch.optim.SGD((other if sick else model).parameters(), lr=0.01)
    )


@case("lr-vanished", "error", "optimizer", where="param group 1", says="8.88e-21")
def lr_vanished(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    groups = [
        {"params": model[0].parameters(), "lr": 0.01},
        {"params": model[2].parameters(), "lr": 8.88e-21 if sick else 1e-6},
    ]
    return regression(model, optimizer=torch.optim.SGD(groups))


@case("large-update", "warning", "optimizer", where="param group 0")
def large_update(sick: bool) -> Setup:
    setup = regression()
    return setup | {
        "optimizer": torch.optim.AdamW(setup["model"].parameters(), lr=0.5 if sick else 1e-3)
    }


@case("small-update", "warning", "optimizer", where="param group 0")
def small_update(sick: bool) -> Setup:
    return with_sgd(regression(), lr=1e-11 if sick else 0.01)


@case("not-optimized", "warning", "optimizer", where="2.weight")
def not_optimized(sick: bool) -> Setup:
    model = mlp(4, 16, 1)
    held = (model[0] if sick else model).parameters()
    return regression(model, optimizer=torch.optim.SGD(held, lr=0.01))


@case("eps-dominates", "warning", "optimizer", where="param group 0")
def eps_dominates(sick: bool) -> Setup:
    setup = regression()
    optimizer = torch.optim.Adam(setup["model"].parameters(), eps=1e3 if sick else 1e-8)
    return setup | {"optimizer": optimizer}


@case("decayed-norms", "note", "optimizer", where="param group 0", says="here 3: 1.weight")
def decayed_norms(sick: bool) -> Setup:
    norm = nn.LayerNorm(16)
    model = nn.Sequential(nn.Linear(4, 16, bias=False), norm, nn.Linear(16, 1))
    matrices = [p for p in model.parameters() if sick or p.ndim > 1]
    rest = [p for p in model.parameters() if not sick and p.ndim < 2]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return regression(model, optimizer=torch.optim.AdamW(groups))


@case("frozen", "note", "optimizer", where="0.weight", says="2 of 4 parameters")
def frozen(sick: bool) -> Setup:
    setup = regression()
    setup["model"][0].requires_grad_(not sick)
    return with_sgd(setup)


# Real steps.


@case("diverges", "error", "real steps", says="destroyed")
def diverges(sick: bool) -> Setup:
    return with_sgd(regression(), lr=1e12 if sick else 0.01)


@case("does-not-fall", "warning", "real steps")
def does_not_fall(sick: bool) -> Setup:
    return with_sgd(regression(), lr=0.01, maximize=sick)


@case("not-checked", "note", "optimizer")
def not_checked(sick: bool) -> Setup:
    return regression() if sick else with_sgd(regression())
