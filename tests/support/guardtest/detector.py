"""Ultralytics runs for tests: a tiny detector, and its trainer's complete state for comparison."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.commands.demo.incidents.detector_data import write_detector

SETTINGS = {
    "epochs": 1,
    "imgsz": 64,
    "batch": 2,
    "nbs": 2,  # one step per batch
    "optimizer": "SGD",
    "lr0": 0.01,
    "box": 0.75,  # a tenth of the trainer's default, so gradient norms stay below its limit of 10
    "cls": 0.05,
    "dfl": 0.15,
    "warmup_epochs": 0,
    "device": "cpu",
    "plots": False,
    "val": False,
    "verbose": False,
}


def train(folder: Path, *attached: Callable[[Any], object], n_train: int = 16, **settings) -> Any:
    """Runs `model.train(...)` and returns the trainer.

    Args:
        folder: Folder for data and results.
        attached: Function that is called with the model before training.
        n_train: Number of images; a batch has two.
        settings: Arguments of `model.train` that replace those in `SETTINGS`.
    """
    from ultralytics import YOLO

    data = folder / "data"
    if not data.exists():
        write_detector(data, n_train)
    model = YOLO(data / "tiny.yaml")
    for attach in attached:
        attach(model)
    run = {"data": str(data / "data.yaml"), "project": str(folder), "name": "run"}
    model.train(**run | SETTINGS | settings)
    return model.trainer


def left_out(batches: Collection[tuple[int, int]]) -> Callable[[Any], None]:
    """Draws and drops the batches with these epochs and numbers, which count from 1."""

    def attach(model: Any) -> None:
        def on_train_start(trainer: Any) -> None:
            trainer.train_loader = _Without(trainer, batches)

        model.add_callback("on_train_start", on_train_start)

    return attach


class _Without:
    def __init__(self, trainer: Any, batches: Collection[tuple[int, int]]) -> None:
        self._trainer = trainer
        self._loader = trainer.train_loader
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self):
        for number, batch in enumerate(self._loader, 1):
            if (self._trainer.epoch + 1, number) not in self._batches:
                yield batch


def state_of(trainer: Any) -> dict[str, Tensor]:
    """Returns all state that a step changes: weights, BatchNorm statistics, EMA, optimizer."""
    named = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    named |= {f"ema.{k}": v for k, v in trainer.ema.ema.state_dict().items()}
    named["ema.updates"] = torch.tensor(trainer.ema.updates)
    for i, p in enumerate(trainer.model.parameters()):
        for key, value in trainer.optimizer.state.get(p, {}).items():
            named[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    return {name: tensor.detach().clone() for name, tensor in named.items()}
