"""`EpochLosses`: excludes the losses of skipped batches from an Ultralytics epoch.

The trainer keeps a running mean of each loss part, which a single NaN makes NaN. If the loss of the
epoch's last batch is NaN, the trainer also assumes that the weights are destroyed, goes back to
`last.pt` and repeats the whole epoch. Both reactions are wrong for a batch that was skipped.
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
        # The trainer's means when they were last finite.
        self._means: Mapping[str, Tensor] | None = None
        self._loss: Tensor | None = None  # loss of the last applied step

    def applied(self, trainer: Any) -> None:
        """Records that the step of the current batch was applied."""
        self._loss = trainer.loss.detach()

    def repair_means(self, trainer: Any) -> None:
        """Restores running means that a batch made NaN or Inf. Synchronizes with the GPU."""
        if trainer.tloss is None:
            return
        if all(math.isfinite(mean) for mean in trainer.tloss.values()):
            self._means = trainer.tloss
        else:
            # None if there is no mean yet, so that the mean starts with the next batch.
            trainer.tloss = self._means

    def close(self, trainer: Any) -> None:
        """Corrects the losses at the end of the epoch.

        A NaN loss is kept, so that the trainer recovers, if the weights are not finite or no step
        of the whole epoch was applied.
        """
        self.repair_means(trainer)
        if trainer.tloss is None:  # no batch of the epoch was good
            trainer.tloss = trainer.loss_items
        lost = trainer.loss is not None and not trainer.loss.isfinite()
        if lost and self._loss is not None and _is_finite(trainer.model):
            trainer.loss = self._loss


def _is_finite(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return all(bool(torch.isfinite(t).all()) for t in tensors)
