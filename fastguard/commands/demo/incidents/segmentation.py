"""C. The segmentation model with too many heads: a U-Net with refinement modules under AMP.

Three of its four heads cause problems. The boundary refinement divides by the norm of the image's
gradient, which is 0 where a resize operation padded the image with black. The gradients of the
contour head are a hundred times as large as the other gradients, so with a single limit the mask
hardly learns. The distance head once gets targets in another unit. In the original run, clipped at
5, every weight is NaN from the first padded image on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard import GuardedOptimizer, SpikeRule, StepRecord, Threshold, explain_nonfinite
from fastguard.commands.demo.incidents import Outcome
from fastguard.commands.demo.incidents.plain_loop import (
    all_finite,
    quiet_one_thread,
    state_is_finite,
)
from fastguard.commands.demo.incidents.segmentation_data import Batch, Kind, draw
from fastguard.commands.demo.incidents.segmentation_model import HEADS, UNet, losses
from fastguard.diagnosis.provenance import NonFiniteReport

BATCHES, BATCH_SIZE = 150, 4
FAULTS = {81: Kind.LETTERBOX, 121: Kind.MICROMETERS}  # by batch, counted from 1
LR, MOMENTUM = 0.02, 0.9
MAX_NORM_BEFORE = 5.0  # limit of the original run
GUARD: dict[str, Any] = {
    "max_norm": 1.0,
    "clip_scope": "group",
    "spike": {
        "grad_norm": Threshold(max=100.0, action="record"),
        "distance": SpikeRule(window=64, warmup=32, action="record"),
    },
}
LIMITS: dict[str, dict[str, float]] = {
    "contour": {"max_norm": 0.1},
    "distance": {"max_norm": math.inf, "clip_value": 0.2},
}
LEARNED = 0.5  # mask IoU, which stays at 0 with a single limit


def run(folder: Path, guarded: bool) -> Outcome:
    """Trains the U-Net; see `Incident.run`. The losses are the mask losses.

    Facts: `weights` and `momenta`, whether they are finite at the end; `iou`, the intersection over
    union of the mask on held-out images; `distance_error`, the loss of the distance head on these
    images; `largest_gradient`, the largest element that reached the optimizer in each step taken,
    by param group. The guarded run adds `clip_coefs`, the coefficients of each step by param group,
    and `explained`, the `NonFiniteReport` of the first skipped batch.
    """
    with quiet_one_thread():
        torch.manual_seed(0)
        random = torch.Generator().manual_seed(1)
        model = UNet()
        stepper = Guarded(model) if guarded else AsItWas(model)
        mask_losses = []
        for number in range(1, BATCHES + 1):
            batch = draw(BATCH_SIZE, random, FAULTS.get(number))
            with autocast():
                parts = losses(model(batch[0]), batch[1])
            torch.stack([*parts.values()]).sum().backward()
            stepper.step(parts, number, batch)
            stepper.optimizer.zero_grad()
            mask_losses.append(parts["seg"].item())
        facts = {
            **_evaluate(model),
            "momenta": state_is_finite(stepper.optimizer),
            **stepper.facts(),
        }

    survived = facts["weights"] and facts["momenta"] and facts["iou"] > LEARNED
    return Outcome(survived, _sentence(facts, stepper.records), mask_losses, stepper.records, facts)


def autocast() -> torch.autocast:
    """The run's mixed-precision context."""
    return torch.autocast("cpu", torch.bfloat16)


def param_groups(
    model: UNet, limits: Mapping[str, Mapping[str, float]] | None = None
) -> list[dict[str, Any]]:
    """One param group for the body and one per head, each with its own limit."""
    parts: dict[str, list[Tensor]] = {"body": [], **{head: [] for head in HEADS}}
    for name, parameter in model.named_parameters():
        module = name.partition(".")[0]
        parts[module if module in HEADS else "body"].append(parameter)
    own = limits or {}
    return [{"name": name, "params": p, **own.get(name, {})} for name, p in parts.items()]


class AsItWas:
    """The steps of the original run: one limit for all gradients."""

    def __init__(self, model: UNet) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer = self._sgd({})
        self.records: list[StepRecord] = []
        self.largest_gradient: list[dict[str, float]] = []

    def _sgd(self, limits: Mapping[str, Mapping[str, float]]) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(param_groups(self.model, limits), lr=LR, momentum=MOMENTUM)
        sgd.register_step_pre_hook(self._record_largest)
        return sgd

    def _record_largest(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.largest_gradient.append(
            {
                group["name"]: max(float(p.grad.abs().max()) for p in group["params"])
                for group in optimizer.param_groups
            }
        )

    def step(self, parts: Mapping[str, Tensor], number: int, batch: Batch) -> None:
        """Takes one step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM_BEFORE)
        self.optimizer.step()

    def facts(self) -> dict[str, Any]:
        """The measurements of the run."""
        return {"largest_gradient": self.largest_gradient}


class Guarded(AsItWas):
    """The same steps with fastguard."""

    def __init__(self, model: UNet) -> None:
        super().__init__(model)
        self.guard: GuardedOptimizer = GuardedOptimizer(
            self._sgd(LIMITS), named_parameters=model.named_parameters(), **GUARD
        )
        self.optimizer: torch.optim.Optimizer = self.guard
        self.clip_coefs: list[dict[str, float]] = []
        self.explained: NonFiniteReport | None = None

    def step(self, parts: Mapping[str, Tensor], number: int, batch: Batch) -> None:
        """Takes one guarded step; explains the first step that is skipped."""
        self.guard.step(loss=dict(parts), tag={"batch": number})
        (record,) = self.guard.flush()
        self.records.append(record)
        self.clip_coefs.append(self._coefs())
        # after a skip, the weights are unchanged
        if record.action == "skipped" and self.explained is None:
            self.explained = explain_nonfinite(self.model, batch, losses, autocast=autocast())

    def _coefs(self) -> dict[str, float]:
        assert self.guard.last is not None
        coefs = self.guard.last.clip_coef.tolist()
        names = [group["name"] for group in self.guard.param_groups]
        return dict(zip(names, coefs if len(coefs) > 1 else coefs * len(names), strict=True))

    def facts(self) -> dict[str, Any]:
        """The measurements of the run."""
        return super().facts() | {"clip_coefs": self.clip_coefs, "explained": self.explained}


@torch.no_grad()
def _evaluate(model: UNet) -> dict[str, Any]:
    """The quality of the model on held-out images."""
    images, targets = draw(16, torch.Generator().manual_seed(2))
    maps = model(images)
    found, real = maps["seg"] > 0, targets["mask"] > 0
    return {
        "weights": all_finite(model.parameters()),
        "iou": ((found & real).sum() / (found | real).sum()).item(),
        "distance_error": losses(maps, targets)["distance"].item(),
    }


def _sentence(facts: Mapping[str, Any], records: list[StepRecord]) -> str:
    if not facts["weights"]:
        return "the weights are NaN"
    skipped = ", ".join(str(record.step) for record in records if record.action == "skipped")
    report = facts.get("explained")
    where = f" (first NaN in {report.module})" if report is not None and report.found else ""
    return (
        f"trained all {BATCHES} batches, skipped {skipped or 'none'}{where}; IoU {facts['iou']:.2f}"
    )
