"""B. The checkpoint that could not be trusted: two bad batches, and what they leave on the disk.

The script skips steps with non-finite gradients by hand, so no weight is NaN. But the forward pass
has already updated BatchNorm, so the running statistics of the model and of the EMA are NaN.
Training does not use the running statistics: the losses stay finite, and an epoch that is meant to
verify the fix succeeds. `last.pt` contains NaN, and so does `best.pt`, which is chosen by training
loss. In epoch 5 the statistics are frozen, as is usual at the end of a run, and all weights become
NaN. The guarded run goes back a few batches, and all its checkpoints are verified.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from fastguard import CheckpointStore, GuardedLR, GuardedOptimizer, Rollback, TrainingDivergedError
from fastguard.checkpoints import inspect
from fastguard.commands.demo.incidents import Outcome
from fastguard.commands.demo.incidents.classifier_data import Kind, draw
from fastguard.commands.demo.incidents.classifier_files import Files
from fastguard.commands.demo.incidents.classifier_model import Classifier, averaged
from fastguard.commands.demo.incidents.plain_loop import quiet_one_thread
from fastguard.records.step_record import StepRecord

EPOCHS, BATCHES, BATCH_SIZE = 6, 48, 16
FAULTS = {(3, 15): Kind.BAD_PIXEL, (3, 46): Kind.BAD_PIXEL}  # by epoch and batch, from 1
FROZEN_FROM = 5  # the epoch from which BatchNorm's statistics are frozen
LR, MOMENTUM, MAX_NORM = 0.02, 0.9, 10.0
STORE: dict[str, Any] = {"keep": 2, "mode": "min"}  # the metric is a loss
ROLLBACK: dict[str, Any] = {"every": 20, "after_skips": 1, "lr_factor": 0.5, "max_attempts": 3}
LEARNED = 0.8  # accuracy on held-out images; chance level is a quarter


def run(folder: Path, guarded: bool) -> Outcome:
    """Trains the classifier, resuming from any files in the folder; see `Incident.run`.

    Facts: `files`, the non-finite tensors of each checkpoint by file name; `last`, the name of the
    file to resume from; `accuracy` of its EMA on held-out images; `error`, the message if the run
    ended early, or None. The guarded run adds `entries`, the entries of the manifest, and lists
    with one item per rollback: `rewinds`, `redone` (the number of repeated batches), `seconds`, and
    `lr` (the learning rate after the rollback).
    """
    with quiet_one_thread():
        training = Guarded(folder) if guarded else AsItWas(folder)
        with closing(training):
            error = None
            try:
                training.train()
            except TrainingDivergedError as failure:
                error = str(failure)
            facts = {**training.facts(), "error": error}
    survived = error is None and facts["accuracy"] > LEARNED
    sentence = _sentence(facts, training)
    return Outcome(survived, sentence, training.losses, training.records, facts)


class AsItWas:
    """The original run: steps skipped by hand, and plain checkpoint files.

    Args:
        folder: Folder of the files; the run resumes from them if there are any.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model: Classifier = Classifier()
        self.ema: AveragedModel = averaged(self.model)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=MOMENTUM
        )
        self.losses: list[float] = []
        self.records: list[StepRecord] = []
        self.batch: int = 0  # number of batches done in the whole run
        self.folder = folder
        self.open()

    @property
    def epochs(self) -> int:
        """Number of epochs done."""
        return self.batch // BATCHES

    def train(self, on_batch: Callable[[int], object] = lambda batch: None) -> None:
        """Trains to the end of the last epoch.

        Args:
            on_batch: Called before each batch with its number.
        """
        while self.batch < EPOCHS * BATCHES:
            on_batch(self.batch + 1)
            self.one_batch(self.batch + 1)

    def one_batch(self, batch: int) -> None:
        """Trains on a batch, and saves at the end of an epoch."""
        self.forward_backward_step(batch)
        self.batch = batch
        if batch % BATCHES == 0:
            self.files.save(
                self.epochs, self.losses[-BATCHES:], self.model, self.ema, self.optimizer
            )

    def forward_backward_step(self, batch: int) -> None:
        """Takes one step and updates the EMA."""
        epoch, number = _place(batch)
        self.model.train_with(frozen_statistics=epoch >= FROZEN_FROM)
        images, labels = draw(BATCH_SIZE, batch, FAULTS.get((epoch, number)))
        loss = cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.take_step(loss, batch)
        self.ema.update_parameters(self.model)
        self.losses.append(loss.item())

    def take_step(self, loss: Tensor, batch: int) -> None:
        """The handwritten check before each step."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        if torch.isfinite(norm):
            self.optimizer.step()

    def open(self) -> None:
        """Resumes from `last.pt`, if there is one."""
        self.files: Files = Files(self.folder)
        self.batch = BATCHES * self.files.load(self.model, self.ema, self.optimizer)

    def close(self) -> None:
        """Cleans up after the last batch."""

    def last(self) -> Path | None:
        """Loads the file to resume from into model and EMA; returns its path."""
        if not self.files.load(self.model, self.ema, self.optimizer):
            return None
        return self.folder / "last.pt"

    def facts(self) -> dict[str, Any]:
        """See `run`."""
        last = self.last()
        files = {path.name: inspect(path).bad for path in sorted(self.folder.rglob("*.pt"))}
        return {
            "files": {name: tuple(tensor for tensor, *_ in bad) for name, bad in files.items()},
            "last": None if last is None else last.name,
            "accuracy": math.nan if last is None else self.validate()["accuracy"],
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy of the EMA on held-out images."""
        images, labels = draw(256, seed=0)
        scores = self.ema.eval()(images)
        return {
            "loss": cross_entropy(scores, labels).item(),
            "accuracy": (scores.argmax(dim=1) == labels).float().mean().item(),
        }


class Guarded(AsItWas):
    """The same run with fastguard and a checkpoint store."""

    def open(self) -> None:
        """Guards the optimizer, opens the store and resumes from it."""
        parameters = self.model.named_parameters()
        self.guard: GuardedOptimizer = GuardedOptimizer(
            self.optimizer, max_norm=MAX_NORM, named_parameters=parameters
        )
        self.optimizer: torch.optim.Optimizer = self.guard
        self.lr: GuardedLR = GuardedLR(self.guard)
        self.rewinds: list[dict[str, Any]] = []
        self.leave_out: set[int] = set()  # batches to leave out from now on
        self.unsaved: list[StepRecord] = []
        self.objects: dict[str, Any] = {
            "model": self.model, "ema": self.ema, "optimizer": self.guard, "lr": self.lr,
        }  # fmt: skip
        self.store: CheckpointStore = CheckpointStore(self.folder / "checkpoints", **STORE)
        if self.store.list():
            position = self.store.load("last-clean", self.objects).state["position"]
            self.batch, self.leave_out = position["batch"], set(position["leave_out"])
        else:  # ensures that there is a checkpoint to go back to
            self.store.save(self.objects, step=0, epoch=0, position=self.position())
        self.rollback: Rollback = Rollback(
            self.guard,
            {"model": self.model, "ema": self.ema},
            lr=self.lr,
            position=self.batch,
            **ROLLBACK,
        )
        self.store.save_on_signal()  # SIGTERM

    def position(self) -> dict[str, Any]:
        """The position in the data."""
        return {"batch": self.batch, "leave_out": sorted(self.leave_out)}

    def one_batch(self, batch: int) -> None:
        """Trains on a batch unless it is left out, then rolls back or saves if that is due."""
        self.batch: int = batch
        if batch not in self.leave_out:
            self.forward_backward_step(batch)
            if self.roll_back_if_due(batch):
                return
        ends_epoch = batch % BATCHES == 0
        saved = self.store.maybe_save(
            self.objects,
            step=batch,
            every=BATCHES,
            epoch=self.epochs,
            metric=self.validate()["loss"] if ends_epoch else None,
            incidents=self.unsaved,
            position=self.position(),
        )
        if saved is not None:
            self.unsaved.clear()

    def take_step(self, loss: Tensor, batch: int) -> None:
        """Takes the guarded step and collects its records."""
        epoch, number = _place(batch)
        self.guard.step(loss=loss, tag={"epoch": epoch, "batch": number})
        self.lr.step()
        news = self.guard.flush()
        self.records.extend(news)
        self.unsaved += [record for record in news if record.is_incident]

    def roll_back_if_due(self, batch: int) -> bool:
        """Rolls back if the step was bad; `self.batch` is then the batch to resume from."""
        start = time.perf_counter()
        rewind = self.rollback.step(position=batch)
        if rewind is None:
            return False
        seconds = time.perf_counter() - start
        self.batch = rewind.position
        self.leave_out.update(rewind.skip)
        lr = self.guard.param_groups[0]["lr"]
        redone = batch - self.batch
        self.rewinds.append({"rewind": rewind, "redone": redone, "seconds": seconds, "lr": lr})
        return True

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def last(self) -> Path | None:
        """Loads the last checkpoint into model and EMA; returns its path."""
        entry = self.store.load("last", model=self.model, ema=self.ema).entry
        return self.store.directory / entry.file

    def facts(self) -> dict[str, Any]:
        """See `run`."""
        return super().facts() | {
            "entries": self.store.list(),
            **{k: [r[k] for r in self.rewinds] for k in ("redone", "seconds", "lr")},
            "rewinds": [r["rewind"] for r in self.rewinds],
        }


def _place(batch: int) -> tuple[int, int]:
    """Converts a batch number of the run to epoch and batch within the epoch, all from 1."""
    epoch, number = divmod(batch - 1, BATCHES)
    return epoch + 1, number + 1


def _sentence(facts: Mapping[str, Any], training: AsItWas) -> str:
    if facts["error"]:
        return facts["error"]
    lost = [name for name, bad in facts["files"].items() if bad]
    if lost:
        nan = sum(not math.isfinite(loss) for loss in training.losses)
        return f"{nan} losses are NaN; files with NaN: {', '.join(lost)}"
    redone = " and ".join(map(str, facts.get("redone", ()))) or "no"
    return f"accuracy {facts['accuracy']:.2f}, every checkpoint clean; {redone} batches repeated"
