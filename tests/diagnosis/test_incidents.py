"""Setups with several faults, as in incident D, are diagnosed in one run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastguard import diagnose


class Unit(nn.Module):
    """Divides by a norm without an eps."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)


class Broken(nn.Module):
    """Predicts a mask of 32 x 32 instead of 224 x 224 and a class. One head is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.refine = Unit()
        self.decoder = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Conv2d(16, 1, 3, padding=1))
        self.classifier = nn.Linear(16, 5)
        self.boundary = nn.Conv2d(16, 1, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.refine(self.encoder(x))
        return {
            "mask": self.decoder(features),
            "label": self.classifier(features.mean(dim=(2, 3))),
        }


def both_losses(output: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "segmentation": functional.binary_cross_entropy_with_logits(output["mask"], target["mask"]),
        "classification": functional.cross_entropy(output["label"], target["label"]),
    }


def broken_setup() -> dict[str, Any]:
    model = Broken()
    with torch.no_grad():
        model.encoder[2].bias.fill_(-10.0)  # all 16 channels are then 0 where the input is dark
    images = torch.rand(4, 3, 224, 224)
    images[0] *= 255.0
    images[1, 0, 17, 17] = math.nan
    target = {"mask": (torch.rand(4, 1, 224, 224) > 0.5).float(), "label": torch.arange(4)}
    # The learning rate after too many epochs of its schedule.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    optimizer.step()
    for _ in range(18):
        schedule.step()
    return {
        "model": model,
        "batch": (images, target),
        "loss_fn": both_losses,
        "optimizer": optimizer,
    }


def test_all_faults_of_a_broken_setup_are_reported_in_order_of_importance() -> None:
    found = diagnose(**broken_setup())

    bad = [(f.kind, f.where) for f in found.at_least("warning")]
    expected = [
        ("shape-mismatch", "mask"),
        ("lr-vanished", "param group 0"),
        ("nonfinite-activation", "refine (Unit)"),
        ("nonfinite-activation", "encoder.0 (Conv2d)"),
        ("no-gradient", "boundary.weight"),
        ("nonfinite-data", "inputs"),
        ("range", "inputs"),
    ]
    assert [finding for finding in bad if finding in expected] == expected
    assert all(f.remedy for f in found.at_least("warning"))
    assert found.seconds < 30

    by_kind = {f.kind: f for f in reversed(found.findings)}
    assert "[4, 1, 32, 32] and target [4, 1, 224, 224]" in by_kind["shape-mismatch"].seen
    assert "started at 0.001" in by_kind["lr-vanished"].seen
    assert by_kind["lr-vanished"].value == pytest.approx(1e-21)
    seen = by_kind["nonfinite-activation"].seen
    assert "aten.div.Tensor" in seen and "denominators are exactly 0" in seen
    assert "x / x.norm(dim=1, keepdim=True)" in seen
    assert "not contribute to the output" in by_kind["no-gradient"].seen


def test_the_repaired_setup_has_no_problems() -> None:
    setup = broken_setup()
    model = setup["model"]
    model.decoder = nn.Sequential(
        nn.Upsample(size=224, mode="bilinear"), nn.Conv2d(16, 1, 3, padding=1)
    )
    model.refine = nn.BatchNorm2d(16)
    del model.boundary
    nn.init.zeros_(model.encoder[2].bias)
    images, target = setup["batch"]
    images = torch.rand_like(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    setup |= {"batch": (images, target), "optimizer": optimizer}
    found = diagnose(**setup)
    assert found.ok, str(found)


def test_an_overflow_in_float16_is_attributed_to_the_dtype() -> None:
    """The squares in a module exceed the range of float16; the model itself is sound."""

    class Refine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            energy = self.mix(x).square()
            return energy / (energy.mean(dim=1, keepdim=True) + 1e-6)

    model = nn.Sequential(Refine(), nn.Linear(8, 1))
    nn.init.constant_(model[0].mix.bias, 400.0)
    batch = torch.randn(16, 8), torch.randn(16, 1)

    def found(dtype: torch.dtype | None) -> dict[str, Any]:
        autocast = torch.autocast("cpu", dtype) if dtype else None
        findings = diagnose(model, batch, functional.mse_loss, autocast=autocast)
        return {f.kind: f for f in findings}

    overflow = found(torch.float16)["float16-range"]
    assert overflow.severity == "error"
    assert "the cause is the range of float16, not the model" in overflow.seen
    assert overflow.where == "0 (Refine)"
    assert overflow.value == pytest.approx(400**2, rel=0.1)

    assert not found(torch.bfloat16).keys() & {"float16-range", "nonfinite-activation"}
    # Without autocast there is only a warning that float16 would overflow.
    in_float32 = found(None)
    assert "float16-range" not in in_float32
    assert in_float32["float16-overflow"].where == "0 (Refine)"


def test_a_failure_in_float32_too_is_attributed_to_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Unit(), nn.Linear(4, 1))
    batch = torch.zeros(2, 4), torch.ones(2, 1)
    autocast = torch.autocast("cpu", torch.float16)
    found = diagnose(model, batch, functional.mse_loss, autocast=autocast)
    assert found.of("nonfinite-activation")[0].where == "1 (Unit)"
    assert found.of("float16-range") == []
