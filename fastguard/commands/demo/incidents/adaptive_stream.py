"""D. The model that could not learn: segmentation and classification, 224 x 224.

The decoder's mask is 32 x 32, so its loss cannot be computed and counts as Inf. Attention divides
by a length of 0 wherever the image is black, so the other loss is NaN. The run therefore never
takes a step, while the schedule, meant for epochs, halves the learning rate at each batch, down to
8.88e-21. `diagnose` reports all of these faults at once. After its advice has been applied and the
optimizer guarded, the same script learns. The schedule remains unchanged, because `GuardedLR` sets
a minimum for the learning rate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, StepLR

from fastguard import (
    ActivationGuard,
    GuardedLR,
    GuardedOptimizer,
    StepRecord,
    Threshold,
    Warmup,
    check_batch,
    diagnose,
)
from fastguard.commands.demo.incidents import Outcome
from fastguard.commands.demo.incidents.adaptive_stream_data import Batch, Kind, draw
from fastguard.commands.demo.incidents.adaptive_stream_model import (
    PARTS,
    AdaptiveStream,
    as_it_was,
    losses,
    quality,
    repaired,
)
from fastguard.commands.demo.incidents.plain_loop import all_finite, quiet_one_thread

BATCHES, BATCH_SIZE = 120, 4
PATIENCE = 50  # batches without a better loss before the run stops
FAULTS = {30: Kind.DEAD_PIXEL, 60: Kind.SWAPPED_BYTES, 90: Kind.SIXTEEN_BITS}  # by batch, from 1
LR_BEFORE, LR = 1e-5, 2e-2
HALVED_EVERY = 1  # calls of `step`; the schedule was meant to be stepped once per epoch
SCHEDULE: dict[str, Any] = {"floor": 1e-2, "warmup": Warmup(steps=10, lr=2e-2)}
GUARD: dict[str, Any] = {
    "max_norm": 1.0,
    "spike": {
        "grad_norm": Threshold(max=100.0),  # skips the step
        # the signal is 1 if inputs are out of range
        "batch.inputs": Threshold(max=0.5, action="record"),
    },
}
ACTIVATIONS: dict[str, Any] = {"mode": "clean", "limit": 100.0}
LEARNED = {"iou": 0.6, "accuracy": 0.8}  # chance level: 0.13 for a full mask, and a fifth


def run(folder: Path, guarded: bool) -> Outcome:
    """Trains as the original run did; or diagnoses that run, then trains with its faults fixed.

    See `Incident.run`. The losses are the classification losses. Facts: `iou` and `accuracy` on
    held-out images; `weights`, whether they are finite; `steps`, the number of steps taken;
    `parts`, the parts of the last loss; `lr`, the learning rate before each batch and after the
    last. The guarded run adds `found`, the diagnosis of the original run; `counts`, the counts of
    the activation guard by module, for each batch; `batch_checks`, the result of `check_batch` for
    each batch; and `held_at_floor`, see `GuardedLR`.
    """
    with quiet_one_thread():
        found = diagnose(**make()) if guarded else None
        training = Guarded() if guarded else AsItWas()
        training.train()
        facts = {**training.facts(), "found": found}
    survived = facts["weights"] and all(facts[name] > least for name, least in LEARNED.items())
    sentence = _sentence(facts, training)
    return Outcome(survived, sentence, training.losses, training.records, facts)


def make() -> dict[str, Any]:
    """The setup for `fastguard diagnose`: the model and optimizer after the run, and a batch."""
    training = AsItWas()
    training.train()
    return {
        "model": training.model,
        "batch": draw(BATCH_SIZE, 1, Kind.DEAD_PIXEL, scaled=False),
        "loss_fn": losses,
        "optimizer": training.optimizer,
    }


class AsItWas:
    """The original script."""

    lr_at_start = LR_BEFORE
    scaled = False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: AdaptiveStream = self.new_model()
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr_at_start
        )
        self.schedule: LRScheduler = self.halving()
        self.losses: list[float] = []
        self.lr: list[float] = []
        self.parts: dict[str, float] = {}
        self.steps: int = 0
        self.records: list[StepRecord] = []

    def new_model(self) -> AdaptiveStream:
        """Creates the model of the script."""
        return as_it_was()

    def halving(self) -> LRScheduler:
        """The schedule of the script."""
        return StepLR(self.optimizer, step_size=HALVED_EVERY, gamma=0.5)

    def train(self) -> None:
        """Trains to the last batch, or until the loss stops improving."""
        best, waited = math.inf, 0
        for batch in range(1, BATCHES + 1):
            self.lr.append(self.optimizer.param_groups[0]["lr"])
            data = draw(BATCH_SIZE, batch, FAULTS.get(batch), scaled=self.scaled)
            self.losses.append(self.one_batch(data, batch))
            # torch warns that the schedule is stepped before the optimizer.
            with warnings.catch_warnings(action="ignore"):
                self.schedule.step()
            better = self.losses[-1] < best
            best, waited = (self.losses[-1], 0) if better else (best, waited + 1)
            if waited == PATIENCE:
                return

    def one_batch(self, data: Batch, batch: int) -> float:
        """Takes one step if the loss allows it; returns the classification loss."""
        images, targets = data
        output = self.model(images)
        parts = {}
        for name, part in PARTS.items():
            try:
                parts[name] = part(output[name], targets[name])
            except ValueError:  # the script ignores the shape mismatch to finish the epoch
                parts[name] = torch.tensor(math.inf)
        self.parts = {name: loss.item() for name, loss in parts.items()}
        total = torch.stack([*parts.values()]).sum()
        if torch.isfinite(total):
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
            self.steps += 1
        return self.parts["label"]

    def facts(self) -> dict[str, Any]:
        """See `run`."""
        images, targets = draw(32, 0, scaled=self.scaled)
        with torch.no_grad():
            output = self.model(images)
        return {
            **quality(output, targets),
            "weights": all_finite(self.model.parameters()),
            "steps": self.steps,
            "parts": self.parts,
            "lr": [*self.lr, self.optimizer.param_groups[0]["lr"]],
        }


class Guarded(AsItWas):
    """The script with the advice applied and fastguard's lines added."""

    lr_at_start = LR
    scaled = True

    def __init__(self) -> None:
        super().__init__()
        self.guard: GuardedOptimizer = GuardedOptimizer(
            self.optimizer, named_parameters=self.model.named_parameters(), **GUARD
        )
        self.optimizer: torch.optim.Optimizer = self.guard
        self.guarded_lr: GuardedLR = GuardedLR(self.halving(), **SCHEDULE)
        self.schedule: LRScheduler = self.guarded_lr
        self.activations: ActivationGuard = ActivationGuard(self.model, **ACTIVATIONS)
        self.counts: list[dict[str, Any]] = []
        self.batch_checks: list[str] = []

    def new_model(self) -> AdaptiveStream:
        """Creates the repaired model."""
        return repaired()

    def one_batch(self, data: Batch, batch: int) -> float:
        """Takes one guarded step; returns the classification loss."""
        images, targets = data
        check = check_batch(images, low=0.0, high=1.0)
        parts = losses(self.model(images), targets)
        total = torch.stack([*parts.values()]).sum()
        self.optimizer.zero_grad()
        total.backward()
        self.guard.step(loss={**parts, **check.signals()}, tag={"batch": batch})
        (record,) = self.guard.flush()
        self.records.append(record)
        self.steps: int = self.guard.applied_steps
        self.batch_checks.append(str(check))
        self.counts.append(self.activations.counts())
        self.activations.reset()
        self.parts: dict[str, float] = {name: loss.item() for name, loss in parts.items()}
        return self.parts["label"]

    def facts(self) -> dict[str, Any]:
        """See `run`."""
        return super().facts() | {
            "counts": self.counts,
            "batch_checks": self.batch_checks,
            "held_at_floor": self.guarded_lr.held_at_floor,
        }


def _sentence(facts: Mapping[str, Any], training: AsItWas) -> str:
    quality = f"IoU {facts['iou']:.4f}, accuracy {facts['accuracy']:.4f}"
    n, lr = len(training.losses), facts["lr"][-1]
    if n < BATCHES:
        return f"stopped after {n} batches and {facts['steps']} steps at lr {lr:.3g}; {quality}"
    skipped = [str(r.tag["batch"]) for r in training.records if r.action == "skipped"]
    return f"trained all {n} batches, skipped {' and '.join(skipped) or 'none'}; {quality}"
