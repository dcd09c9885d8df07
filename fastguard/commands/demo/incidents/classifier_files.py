"""Checkpoints as a detection trainer writes them: whole pickled modules, without verification."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fastguard.commands.demo.incidents.classifier_model import Classifier

SAVE_PERIOD = 2  # epochs


class Files:
    """Writes `last.pt` each epoch, `best.pt` on the best fitness, `epoch2.pt`, `epoch4.pt`, ...

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best_fitness: float = -math.inf

    def save(
        self,
        epoch: int,
        losses: Sequence[float],
        model: Classifier,
        ema: AveragedModel,
        optimizer: Optimizer,
    ) -> None:
        """Saves at the end of an epoch. Validation is off, so the fitness is the training loss."""
        fitness = -statistics.fmean(losses)
        content = {
            "epoch": epoch,
            "fitness": fitness,
            "model": model,
            "ema": ema.module,
            "updates": ema.n_averaged,
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, self.folder / "last.pt")
        if fitness > self.best_fitness:
            self.best_fitness = fitness
            torch.save(content, self.folder / "best.pt")
        if epoch % SAVE_PERIOD == 0:
            torch.save(content, self.folder / f"epoch{epoch}.pt")

    def load(self, model: Classifier, ema: AveragedModel, optimizer: Optimizer) -> int:
        """Resumes from `last.pt`; returns the number of completed epochs, 0 without a file."""
        path = self.folder / "last.pt"
        if not path.exists():
            return 0
        content = torch.load(path, weights_only=False)  # pickled modules, written by this script
        model.load_state_dict(content["model"].state_dict())
        ema.module.load_state_dict(content["ema"].state_dict())
        ema.n_averaged.copy_(content["updates"])
        optimizer.load_state_dict(content["optimizer"])
        return content["epoch"]
