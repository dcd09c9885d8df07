"""The order of findings, and how a diagnosis is formatted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastguard
from fastguard import Diagnosis, Finding, diagnose
from fastguard.diagnosis import CHECKS, KINDS
from fastguard.diagnosis.finding import SEVERITIES
from guardtest import require
from guardtest.kinds.setups import regression
from guardtest.sound import sound_batch, sound_model


def finding(kind: str, severity: str, check: str = "data", **more: Any) -> Finding:
    return Finding(check, kind, severity, "seen", **more)  # type: ignore[arg-type]


def test_findings_are_ordered_by_severity_then_importance() -> None:
    model = sound_model()
    batch = sound_batch()
    optimizer = torch.optim.AdamW([model[2].weight], lr=8.88e-21)
    found = diagnose(model.eval(), batch, nn.MSELoss(reduction="sum"), optimizer, data=[batch])
    assert [(f.severity, f.kind) for f in found] == [
        ("error", "lr-vanished"),
        ("warning", "does-not-fall"),
        ("warning", "not-optimized"),
        ("warning", "sum-reduction"),
        ("note", "eval-mode"),
        *[("ok", "ok")] * 5,
    ]
    assert [f.check for f in found][5:] == [
        "initialization",
        "data",
        "forward",
        "backward",
        "precision",
    ]


def test_kinds_are_ordered_by_importance() -> None:
    expected = ["shape-mismatch", "lr-vanished", "nonfinite-activation", "no-gradient"]
    ranks = [KINDS.index(kind) for kind in (*expected, "nonfinite-data", "range")]
    assert ranks == sorted(ranks)
    assert len(set(KINDS)) == len(KINDS)


def test_a_diagnosis_is_formatted_as_text_and_json() -> None:
    found = Diagnosis(
        (
            finding("nonfinite-data", "error", where="inputs", value=math.inf, remedy="drop it"),
            finding("range", "warning", limit=100.0, value=255.0),
            finding("ok", "ok"),
        ),
        seconds=1.25,
    )
    assert str(found).splitlines() == [
        "ERROR   data: nonfinite-data in inputs",
        "        seen",
        "        Remedy: drop it",
        "WARNING data: range",
        "        seen",
        "OK      data: seen",
        "1 error, 1 warning in 1.2 s",
    ]
    assert found.worst == "error" and not found.ok and len(found.errors) == 1
    assert len(found.at_least("warning")) == 2 and found.of("range")[0].value == 255.0
    result = json.loads(found.to_json())
    assert result["findings"][0]["value"] == "Infinity" and result["worst"] == "error"
    assert list(found) == list(found.findings)
    assert Diagnosis((finding("ok", "ok"),), 0.1).ok


def test_the_table_shows_every_finding_and_escapes_markup() -> None:
    require("rich")
    from rich.console import Console

    from fastguard.commands.diagnose.table import table

    found = Diagnosis(
        (
            finding("range", "warning", where="inputs[0]", value=255.0, limit=100.0, remedy="[/]"),
            finding("ok", "ok"),
        ),
        1.0,
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(table(found))
    text = console.export_text()
    for part in ("range inputs[0]", "255", "limit 100", "→ [/]", "warning", "ok"):
        assert part in text


def test_the_public_names() -> None:
    names: list[tuple[str, Callable[..., Any]]] = [("diagnose", diagnose), ("Finding", Finding)]
    assert all(getattr(fastguard, name) is thing for name, thing in names)
    assert len(CHECKS) == 8 and SEVERITIES[0] == "error"


def test_an_empty_batch_comes_first() -> None:
    setup = regression()
    inputs, targets = setup["batch"]
    found = diagnose(setup["model"], (inputs[:0], targets[:0]), setup["loss_fn"])
    assert found.findings[0].kind == "empty-batch"
    further = diagnose(**setup, data=[setup["batch"], (inputs[:0], targets[:0])])
    assert [f.where for f in further.of("empty-batch")] == ["data[1].inputs"]


@pytest.mark.parametrize("n", [1, 8])
def test_a_model_that_returns_its_loss_has_no_shape_finding(n: int) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.layer(x) - y).square().mean()

    batch = torch.randn(n, 4), torch.randn(n, 1)
    found = diagnose(WithLoss(), batch, step=lambda model, batch: model(*batch))
    assert not found.of("resized-output", "shape-mismatch"), str(found)
