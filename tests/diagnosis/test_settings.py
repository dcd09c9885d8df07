"""Optimizer settings that can ruin a run at any learning rate are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastguard import Diagnosis, GuardedOptimizer, diagnose
from guardtest.kinds.setups import mlp, regression
from guardtest.sound import by_kind
from guardtest.versions import needs_torch

MUON = needs_torch(2, 9, "torch.optim.Muon")
KINDS = ("eps-vanished", "weight-decay", "momentum")


def with_dead_unit(dtype: torch.dtype) -> dict[str, Any]:
    """A setup in which the gradients of one unit are exactly 0."""
    torch.manual_seed(0)
    setup = regression(mlp(4, 16, 1).to(dtype))
    nn.init.constant_(setup["model"][0].bias[:1], -10.0)
    return setup | {"batch": tuple(t.to(dtype) for t in setup["batch"])}


def run(
    kind: str, dtype: torch.dtype = torch.float32, *, edit: Any = None, **more: Any
) -> Diagnosis:
    setup = with_dead_unit(dtype)
    parameters = [p for p in setup["model"].parameters() if kind != "Muon" or p.ndim == 2]
    optimizer = getattr(torch.optim, kind)(parameters, **more)
    optimizer.param_groups[0].update(edit or {})
    return diagnose(**setup, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax"])
@pytest.mark.parametrize("foreach", [False, True])
def test_an_eps_that_rounds_to_0_in_float16_is_an_error(kind: str, foreach: bool) -> None:
    found = by_kind(run(kind, torch.float16, foreach=foreach))
    assert found["eps-vanished"].severity == "error"
    assert "is 0 in float16, whose smallest number is 6e-08" in found["eps-vanished"].seen
    assert "this happened in the first step to 0.weight, 0.bias" in found["eps-vanished"].seen
    assert "float32" in found["eps-vanished"].remedy
    assert "fix the optimizer first: eps" in found["diverges"].remedy
    assert not run(kind, torch.bfloat16, foreach=foreach).of("eps-vanished", "diverges")
    assert not run(kind, torch.float16, foreach=foreach, eps=1e-4).of("eps-vanished", "diverges")


def test_an_eps_that_rounds_to_0_without_effect_is_a_warning() -> None:
    (found,) = run("RAdam", torch.float16).of("eps-vanished")
    assert found.severity == "warning"


def test_an_eps_that_is_not_rounded_is_accepted() -> None:
    assert not run("AdamW", torch.float16, fused=True).of("eps-vanished", "diverges")
    assert not run("Adadelta", torch.float16).of("eps-vanished")  # its eps of 1e-6 is representable
    assert not run("Adafactor").of("eps-vanished")  # its eps is a pair


def test_an_eps_of_0_is_reported() -> None:
    found = by_kind(run("Adam", eps=0.0))
    assert found["eps-vanished"].seen.startswith("eps is 0: ")
    assert "1e-8" in found["eps-vanished"].remedy


@pytest.mark.parametrize(
    "kind, more, severity",
    [
        ("AdamW", {"weight_decay": 50}, "warning"),
        ("AdamW", {"lr": 1e-4, "weight_decay": 50}, "warning"),
        ("AdamW", {"lr": 1e-6, "weight_decay": 50}, "note"),
        ("AdamW", {"lr": 0.03, "weight_decay": 50}, "error"),
        ("NAdam", {"weight_decay": 50, "decoupled_weight_decay": True}, "warning"),
        ("Adafactor", {"weight_decay": 50}, "warning"),
        pytest.param("Muon", {"weight_decay": 50}, "warning", marks=MUON),
        ("SGD", {"lr": 0.01, "weight_decay": 50}, "warning"),
        ("SGD", {"lr": 0.01, "weight_decay": 1, "momentum": 0.9}, "warning"),
        ("SGD", {"lr": 0.1, "weight_decay": 10}, "error"),
        ("ASGD", {"lr": 0.01, "weight_decay": 50}, "warning"),
        ("Adam", {"weight_decay": 50}, "warning"),
        ("RMSprop", {"weight_decay": 50}, "warning"),
        ("NAdam", {"weight_decay": 50}, "warning"),
        ("Adagrad", {"weight_decay": 50}, "warning"),
        ("AdamW", {"edit": {"weight_decay": -0.1}}, "error"),
    ],
)
def test_a_weight_decay_that_dominates_the_step_is_reported(
    kind: str, more: dict, severity: str
) -> None:
    (found,) = run(kind, **more).of("weight-decay")
    assert found.severity == severity
    assert "weight_decay" in found.remedy


def test_a_divergence_caused_by_weight_decay_names_it_in_the_remedy() -> None:
    found = by_kind(run("SGD", lr=0.1, momentum=0.9, weight_decay=50))
    assert found["diverges"].remedy.startswith("fix the optimizer first: lr * weight_decay")


def test_weight_decay_is_judged_at_the_peak_learning_rate() -> None:
    found = run("AdamW", weight_decay=50, edit={"lr": 1e-9, "initial_lr": 1e-3})
    assert found.of("weight-decay")[0].severity == "warning"


@pytest.mark.parametrize(
    "kind, more, severity, says",
    [
        ("SGD", {"lr": 1e-4, "momentum": 0.9999}, "warning", "the step by up to 1e+04"),
        ("SGD", {"lr": 1e-4, "momentum": 1.0}, "error", "momentum=1 is outside [0, 1)"),
        ("SGD", {"lr": 1e-4, "momentum": 0.9, "edit": {"momentum": 1.5}}, "error", "momentum=1.5"),
        ("RMSprop", {"momentum": 0.9999}, "warning", "1e+04 steps"),
        ("RMSprop", {"alpha": 1.0}, "error", "alpha=1"),
        ("Adam", {"betas": (0.999, 0.9)}, "warning", "the two betas look swapped"),
        ("Adam", {"betas": (0.9, 0.5)}, "warning", "decays faster"),
        ("NAdam", {"betas": (0.9999, 0.99995)}, "warning", "1e+04 steps"),
        ("AdamW", {"betas": (0.9, 0.9999999)}, "warning", "does not follow"),
        ("AdamW", {"edit": {"betas": (1.0, 0.999)}}, "error", "betas[0]=1"),
        ("AdamW", {"edit": {"betas": (0.9, 1.0)}}, "error", "betas[1]=1"),
    ],
)
def test_too_long_or_invalid_averages_are_reported(
    kind: str, more: dict, severity: str, says: str
) -> None:
    (found,) = run(kind, **more).of("momentum")
    assert found.severity == severity and says in found.seen


@pytest.mark.parametrize(
    "kind, more",
    [
        ("SGD", {"lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 5e-4}),
        ("Adam", {"betas": (0.5, 0.999), "weight_decay": 1e-2}),
        ("Adam", {"betas": (0.0, 0.9)}),
        ("AdamW", {"betas": (0.9, 0.95), "weight_decay": 1.0}),
        ("AdamW", {"betas": (0.95, 0.98)}),
        ("RMSprop", {"alpha": 0.9, "momentum": 0.9, "weight_decay": 1e-5}),
        *((kind, {}) for kind in ("Adagrad", "Adadelta", "Adamax", "ASGD", "RAdam", "Rprop")),
        ("Adafactor", {}),
        pytest.param("Muon", {}, marks=MUON),
    ],
)
def test_usual_settings_are_accepted(kind: str, more: dict) -> None:
    assert not run(kind, **more).of(*KINDS)


def test_the_optimizer_inside_a_guard_is_checked() -> None:
    setup = with_dead_unit(torch.float16)
    guard = GuardedOptimizer(torch.optim.Adam(setup["model"].parameters()), max_norm=1.0)
    assert diagnose(**setup, optimizer=guard).of("eps-vanished")[0].severity == "error"
