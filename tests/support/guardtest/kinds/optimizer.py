"""Param groups, learning rates, and the size of one update."""

from __future__ import annotations

import torch
from torch import nn

from fastguard import GuardedOptimizer, protect_buffers
from guardtest.kinds.case import Setup, case
from guardtest.kinds.setups import mlp, regression, with_sgd


@case("foreign-optimizer", "error", "optimizer")
def foreign_optimizer(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    other = mlp(4, 16, 1)
    return regression(
        model, optimizer=torch.optim.SGD((other if faulty else model).parameters(), lr=0.01)
    )


@case("lr-vanished", "error", "optimizer", where="param group 1", says="8.88e-21")
def lr_vanished(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    groups = [
        {"params": model[0].parameters(), "lr": 0.01},
        {"params": model[2].parameters(), "lr": 8.88e-21 if faulty else 1e-6},
    ]
    return regression(model, optimizer=torch.optim.SGD(groups))


@case("large-update", "warning", "optimizer", where="param group 0")
def large_update(faulty: bool) -> Setup:
    setup = regression()
    return setup | {
        "optimizer": torch.optim.AdamW(setup["model"].parameters(), lr=0.5 if faulty else 1e-3)
    }


@case("small-update", "warning", "optimizer", where="param group 0")
def small_update(faulty: bool) -> Setup:
    return with_sgd(regression(), lr=1e-11 if faulty else 0.01)


@case("not-optimized", "warning", "optimizer", where="2.weight")
def not_optimized(faulty: bool) -> Setup:
    model = mlp(4, 16, 1)
    held = (model[0] if faulty else model).parameters()
    return regression(model, optimizer=torch.optim.SGD(held, lr=0.01))


@case("eps-dominates", "warning", "optimizer", where="param group 0")
def eps_dominates(faulty: bool) -> Setup:
    setup = regression()
    optimizer = torch.optim.Adam(setup["model"].parameters(), eps=1e3 if faulty else 1e-8)
    return setup | {"optimizer": optimizer}


@case(
    "decayed-norms",
    "note",
    "optimizer",
    where="param group 0",
    says="to 3 biases and scales",
)
def decayed_norms(faulty: bool) -> Setup:
    norm = nn.LayerNorm(16)
    model = nn.Sequential(nn.Linear(4, 16, bias=False), norm, nn.Linear(16, 1))
    matrices = [p for p in model.parameters() if faulty or p.ndim > 1]
    rest = [p for p in model.parameters() if not faulty and p.ndim < 2]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return regression(model, optimizer=torch.optim.AdamW(groups))


@case("unprotected-buffers", "note", "optimizer", where="1 (BatchNorm1d)", says="statistics")
def unprotected_buffers(faulty: bool) -> Setup:
    setup = regression(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)))
    model = setup["model"]
    guard = GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    if not faulty:
        protect_buffers(model, guard)
    return setup | {"optimizer": guard}


@case("frozen", "note", "optimizer", where="0.weight", says="2 of 4 parameters")
def frozen(faulty: bool) -> Setup:
    setup = regression()
    setup["model"][0].requires_grad_(not faulty)
    return with_sgd(setup)


@case("not-checked", "note", "optimizer")
def not_checked(faulty: bool) -> Setup:
    return regression() if faulty else with_sgd(regression())


@case("eps-vanished", "error", "optimizer", where="param group 0", says="eps=1e-08 is 0 in float16")
def eps_vanished(faulty: bool) -> Setup:
    setup = regression(mlp(4, 16, 1).half())
    inputs, targets = (t.half() for t in setup["batch"])
    with torch.no_grad():
        setup["model"][0].bias[0] = -10.0  # a dead unit, whose gradients are exactly 0
    optimizer = torch.optim.Adam(setup["model"].parameters(), eps=1e-8 if faulty else 1e-4)
    return setup | {"batch": (inputs, targets), "optimizer": optimizer}


@case("weight-decay", "warning", "optimizer", where="param group 0", says="every 13.9 steps")
def weight_decay(faulty: bool) -> Setup:
    setup = regression()
    optimizer = torch.optim.AdamW(setup["model"].parameters(), weight_decay=50 if faulty else 0.1)
    return setup | {"optimizer": optimizer}


@case(
    "momentum",
    "warning",
    "optimizer",
    where="param group 0",
    says="step by up to 1e+04",
)
def momentum(faulty: bool) -> Setup:
    return with_sgd(regression(), lr=1e-5, momentum=0.9999 if faulty else 0.9)
