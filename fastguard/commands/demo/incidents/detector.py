"""A. The detector with NaN losses: two bad batches in the Ultralytics trainer, in fp32 with SGD.

In the original run, batch 15 makes every weight and the EMA NaN, every later loss is NaN, and the
trainer goes back to `last.pt` and repeats the epoch three times until it gives up. Guarded, the two
batches are skipped, and training is otherwise unaffected.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastguard.commands.demo.incidents import Outcome
from fastguard.commands.demo.incidents.detector_data import write_detector
from fastguard.commands.demo.incidents.detector_faults import Faults, Kind
from fastguard.commands.demo.incidents.plain_loop import all_finite
from fastguard.commands.demo.training import one_thread
from fastguard.commands.terminal import incidents_unlogged
from fastguard.records.read_json_lines import read_records

os.environ.setdefault("YOLO_OFFLINE", "true")  # set before ultralytics looks for the network

BATCHES = 48  # per epoch
FAULTS = {(3, 15): Kind.OVERFLOW, (3, 46): Kind.BAD_PIXEL}
# Halves the learning rate; it is restored after 20 good steps.
BACKOFF: dict[str, float] = {"backoff": 0.5, "recovery": 20}
SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "imgsz": 64,
    "batch": 1,
    "nbs": 1,  # one step per batch
    "optimizer": "SGD",
    "lr0": 0.001,
    "warmup_epochs": 1,
    "warmup_bias_lr": 0.05,
    "warmup_momentum": 0.8,
    "mosaic": 0.0,
    "scale": 0.0,
    "translate": 0.0,
    # saves a file per epoch, since the trainer strips the optimizer from last.pt only
    "save_period": 1,
    "device": "cpu",
    "plots": False,
    "verbose": False,
}


def run(folder: Path, guarded: bool) -> Outcome:
    """Trains the detector; see `Incident.run`.

    Facts: `epochs`, every epoch begun; `error`, the exception of the trainer; `weights`,
    `statistics` (of BatchNorm), `ema` and `momenta` (of SGD): whether they are finite at the end;
    `ema_updates`; `lr` and `momentum` at each step taken, by name of the param group.
    """
    from ultralytics import YOLO

    architecture, data = write_detector(folder / "data", BATCHES)
    watch = Watch()
    error = None
    with incidents_unlogged("ultralytics"), one_thread():  # without progress bars
        model = YOLO(architecture)
        Faults(FAULTS).attach(model)
        if guarded:
            from fastguard.integrations.ultralytics import guard

            guard(model, schedule=BACKOFF)
        watch.attach(model)
        try:
            model.train(data=str(data), project=str(folder), name="run", **SETTINGS)
        except RuntimeError as failure:
            if watch.trainer is None:  # the error came before training began
                raise
            error = str(failure)

    facts = {**watch.facts(), "error": error}
    records = tuple(read_records(folder / "run" / "records.jsonl")) if guarded else ()
    survived = error is None and all(facts[k] for k in ("weights", "statistics", "ema", "momenta"))
    return Outcome(survived, _sentence(facts, records), watch.losses, records, facts)


class Watch:
    """Observes the trainer batch by batch."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.losses: list[float] = []
        self.epochs: list[int] = []
        self.lr: list[dict[str, float]] = []
        self.momentum: list[dict[str, float]] = []

    def attach(self, model: Any) -> None:
        """Adds callbacks. Must be called after `guard`, so that they see the wrapper."""
        for event in ("on_train_start", "on_train_epoch_start", "on_train_batch_end"):
            model.add_callback(event, getattr(self, event))

    def on_train_start(self, trainer: Any) -> None:
        """Observes the optimizer that takes the steps."""
        self.trainer = trainer
        taking_steps = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        taking_steps.register_step_pre_hook(self._on_step)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Records the epoch."""
        self.epochs.append(trainer.epoch + 1)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Records the loss."""
        self.losses.append(float(trainer.loss.detach()))

    def _on_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        self.lr.append({g["param_group"]: g["lr"] for g in groups})
        self.momentum.append({g["param_group"]: g["momentum"] for g in groups})

    def facts(self) -> dict[str, Any]:
        """See `run`."""
        model, states = self.trainer.model, self.trainer.optimizer.state.values()
        return {
            "epochs": tuple(self.epochs),
            "weights": all_finite(model.parameters()),
            "statistics": all_finite(model.buffers()),
            "ema": all_finite(self.trainer.ema.ema.state_dict().values()),
            "ema_updates": self.trainer.ema.updates,
            "momenta": all_finite(state["momentum_buffer"] for state in states),
            "lr": self.lr,
            "momentum": self.momentum,
        }


def _sentence(facts: dict[str, Any], records: Sequence[Any]) -> str:
    begun, wanted = len(facts["epochs"]), SETTINGS["epochs"]
    if facts["error"]:
        redone = begun - len(set(facts["epochs"]))
        return (
            f"gave up in epoch {facts['epochs'][-1]} of {wanted} after repeating it {redone} "
            f"times: {facts['error']}"
        )
    skipped = [record for record in records if record.action == "skipped"]
    where = " and ".join(f"batch {r.tag['batch']} of epoch {r.tag['epoch']}" for r in skipped)
    return f"trained all {wanted} epochs, skipped {where or 'nothing'}"
