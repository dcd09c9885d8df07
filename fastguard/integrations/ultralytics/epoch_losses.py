"""`EpochLosses`: the books of an Ultralytics epoch, kept free of the losses of skipped batches.

The trainer keeps a running mean of each loss part, which one NaN ends; and it takes a NaN loss of
the epoch's last batch as proof that its weights are lost, goes back to `last.pt` and trains the
whole epoch again. A batch that was skipped proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EpochLosses:
    """The losses of one epoch."""

    def __init__(self) -> None:
        self._means: Mapping[str, Tensor] | None = None  # the trainer's, while they were finite
        self._loss: Tensor | None = None  # of the last applied step

    def applied(self, trainer: Any) -> None:
        """The step of the current batch reached the weights."""
        self._loss = trainer.loss.detach()

    def mend_means(self, trainer: Any) -> None:
        """Takes the batch out of the running means that made them NaN or Inf. Waits for a GPU."""
        if trainer.tloss is None:
            return
        if all(math.isfinite(mean) for mean in trainer.tloss.values()):
            self._means = trainer.tloss
        else:
            trainer.tloss = self._means  # None at the first batch: the mean starts with the next

    def close(self, trainer: Any) -> None:
        """The epoch is over.

        Its recovery stays the trainer's: a NaN loss is left to it when the weights are not finite,
        or when no step of the whole epoch could be applied.
        """
        self.mend_means(trainer)
        if trainer.tloss is None:  # not one good batch
            trainer.tloss = trainer.loss_items
        lost = trainer.loss is not None and not trainer.loss.isfinite()
        if lost and self._loss is not None and _is_finite(trainer.model):
            trainer.loss = self._loss


def _is_finite(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return all(bool(torch.isfinite(t).all()) for t in tensors)
