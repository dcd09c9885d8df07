"""E. The averages that became NaN: a decoder of signed distances and a table of latent codes.

One shape of the validation set has NaN distances, so every validation mean is NaN. The first such
training batch makes the training mean and every weight NaN. In epoch 5 every batch is bad. In the
guarded run, means cover only the finite values and report how many values were not finite. Decoder
and codes each have their own clipping limit, which is read from a file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard import GuardConfig, GuardedOptimizer, LossMeter, StepRecord, TensorBoardSink
from fastguard.commands.demo.incidents import Outcome
from fastguard.commands.demo.incidents.latent_codes_data import Batch, Kind, sample
from fastguard.commands.demo.incidents.latent_codes_model import AutoDecoder, losses
from fastguard.commands.demo.incidents.plain_loop import (
    all_finite,
    quiet_one_thread,
    state_is_finite,
)
from fastguard.records.loss_meter import LossSummary

EPOCHS, BATCHES, BATCH_SIZE = 6, 20, 4
LOST_EPOCH = 5
FAULTS = {  # by epoch and batch, counted from 1
    (2, 7): Kind.OPEN_MESH,
    (3, 4): Kind.MILLIMETERS,
    **{(LOST_EPOCH, batch): Kind.LOST_SCALE for batch in range(1, BATCHES + 1)},
}
VALIDATION_BATCHES, BROKEN_VALIDATION_BATCH = 5, 3
LEARNED = 0.02  # validation MSE; a model that always predicts 0 has 0.13

SETTINGS = """\
[guard]
clip_scope = "group"

[groups."decoder.*"]
max_norm = 1.0

[groups."codes.*"]
max_norm = 0.1

[batch]
names = ["shapes", "points", "sdf"]
low = { sdf = -2.0 }
high = { sdf = 2.0 }

[spike."batch.sdf"]     # 1 if distances are out of that range
max = 0.5
action = "record"
"""


def run(folder: Path, guarded: bool) -> Outcome:
    """Trains decoder and codes; see `Incident.run`. The losses are the distance losses.

    Facts: `training` and `validation`, the printed mean of each epoch, or its `LossSummary` in the
    guarded run; `weights` and `momenta`, whether they are finite at the end; `error`, the final
    mean squared error on the valid validation batches; `arrived`, the gradient norms of decoder and
    codes that the optimizer received in each step. The guarded run adds `clip_coefs`, the clip
    coefficients of decoder and codes, and writes its curves to the folder `tensorboard`.
    """
    with quiet_one_thread():
        torch.manual_seed(0)
        model = AutoDecoder()
        training = Guarded(model, folder) if guarded else AsItWas(model)
        random = torch.Generator().manual_seed(1)
        seen: list[float] = []
        means: dict[str, list[Any]] = {"training": [], "validation": []}
        for epoch in range(1, EPOCHS + 1):
            for batch in range(1, BATCHES + 1):
                data = sample(BATCH_SIZE, random, FAULTS.get((epoch, batch)))
                seen.append(training.step(data, (epoch, batch)))
            means["training"].append(training.mean())
            for batch, data in enumerate(validation_set(), start=1):
                with torch.no_grad():
                    training.average(losses(model, *data), (epoch, batch))
            means["validation"].append(training.mean())
        training.close()
        facts = {**_evaluate(model), **means, "momenta": state_is_finite(training.optimizer)}

    facts |= {"arrived": training.arrived, "clip_coefs": training.clip_coefs}
    survived = facts["weights"] and facts["momenta"] and facts["error"] < LEARNED
    return Outcome(survived, _sentence(facts), seen, training.records, facts)


def validation_set() -> Iterator[Batch]:
    """Yields the same batches in every epoch; one of them contains the mesh with a hole."""
    random = torch.Generator().manual_seed(2)
    for batch in range(1, VALIDATION_BATCHES + 1):
        fault = Kind.OPEN_MESH if batch == BROKEN_VALIDATION_BATCH else None
        yield sample(8, random, fault)


class AsItWas:
    """The steps and means of the original run."""

    def __init__(self, model: AutoDecoder) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer = self._adam()
        self.records: list[StepRecord] = []
        self.arrived: list[list[float]] = []
        self.clip_coefs: list[list[float]] = []
        self._of_the_epoch: list[float] = []

    def _adam(self) -> torch.optim.Optimizer:
        groups = [
            {"params": self.model.decoder.parameters(), "lr": 2e-3},
            {"params": self.model.codes.parameters(), "lr": 1e-2},
        ]
        return torch.optim.Adam(groups, fused=True)

    def step(self, data: Batch, tag: tuple[int, int]) -> float:
        """Takes one step; returns the distance loss before that step."""
        parts = losses(self.model, *data)
        torch.stack([*parts.values()]).sum().backward()
        self.take_step(parts, data, tag)
        modules = self.model.decoder, self.model.codes
        self.arrived.append([_grad_norm(module) for module in modules])
        self.optimizer.zero_grad()
        self.average(parts, tag)
        return parts["sdf"].item()

    def take_step(self, parts: Mapping[str, Tensor], data: Batch, tag: tuple[int, int]) -> None:
        """Takes the optimizer step."""
        self.optimizer.step()

    def average(self, parts: Mapping[str, Tensor], tag: tuple[int, int]) -> None:
        """Adds a batch to the mean of the epoch."""
        self._of_the_epoch.append(parts["sdf"].item())

    def mean(self) -> Any:
        """Returns the mean that is printed at the end of an epoch."""
        mean = statistics.fmean(self._of_the_epoch)
        self._of_the_epoch.clear()
        return mean

    def close(self) -> None:
        """Cleans up after the last epoch."""


class Guarded(AsItWas):
    """The same run guarded, as configured by a settings file."""

    def __init__(self, model: AutoDecoder, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(model)
        file = folder / "guard.toml"
        file.write_text(SETTINGS)
        self.config: GuardConfig = GuardConfig.from_file(file)
        self.guard: GuardedOptimizer = self.config.wrap(model, self.optimizer)
        self.optimizer: torch.optim.Optimizer = self.guard
        self.writer: SummaryWriter = SummaryWriter(str(folder / "tensorboard"))
        self.guard.add_sink(TensorBoardSink(self.writer))
        self.meter: LossMeter = LossMeter()

    def take_step(self, parts: Mapping[str, Tensor], data: Batch, tag: tuple[int, int]) -> None:
        """Checks the batch and takes the guarded step."""
        check = self.config.check(data)
        signals = {} if check is None else check.signals()
        self.guard.step(loss={**parts, **signals}, tag=tag)
        self.records.extend(self.guard.flush())
        assert self.guard.last is not None
        self.clip_coefs.append(self.guard.last.clip_coef.tolist())

    def average(self, parts: Mapping[str, Tensor], tag: tuple[int, int]) -> None:
        """Adds a batch to the loss meter."""
        self.meter.update(parts, tag=tag)

    def mean(self) -> Any:
        """Returns the summary of the loss meter, and resets it."""
        summary = self.meter.compute()
        self.meter.reset()
        return summary

    def close(self) -> None:
        """Closes the TensorBoard writer."""
        self.writer.close()


def _grad_norm(module: torch.nn.Module) -> float:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def _evaluate(model: AutoDecoder) -> dict[str, Any]:
    """The quality of the model on the valid validation batches."""
    errors = [losses(model, *data)["sdf"].item() for data in validation_set()]
    del errors[BROKEN_VALIDATION_BATCH - 1]
    return {"weights": all_finite(model.parameters()), "error": statistics.fmean(errors)}


def _sentence(facts: Mapping[str, Any]) -> str:
    training, validation = map(_numbers, (facts["training"], facts["validation"]))
    if not facts["weights"]:
        n = len(training) + len(validation)
        lost = [mean for mean in training + validation if mean is None or math.isnan(mean)]
        return f"the weights are NaN; {len(lost)} of {n} means are NaN"
    empty = [str(epoch) for epoch, mean in enumerate(training, start=1) if mean is None]
    note = f"; epoch {', '.join(empty)} had no valid batch" if empty else ""
    return f"trained all {EPOCHS} epochs, error {facts['error']:.4f}{note}"


def _numbers(means: list[Any]) -> list[float | None]:
    """The mean distance loss of each epoch; None if an epoch has none."""
    return [mean.means["sdf"] if isinstance(mean, LossSummary) else mean for mean in means]
