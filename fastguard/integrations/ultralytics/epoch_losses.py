"""`EpochLosses`: excludes the losses of skipped batches from an Ultralytics epoch.

The trainer keeps a running mean of each loss part, which a single NaN ruins. It also takes a NaN
loss in the epoch's last batch as a sign of destroyed weights, goes back to `last.pt` and repeats
the whole epoch. A skipped batch is no such sign.
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
        # the trainer's means, while they were finite
        self._means: Mapping[str, Tensor] | None = None
        self._loss: Tensor | None = None  # loss of the last applied step

    def applied(self, trainer: Any) -> None:
        """Records that the step of the current batch was applied."""
        self._loss = trainer.loss.detach()

    def mend_means(self, trainer: Any) -> None:
        """Removes a batch that made the running means NaN or Inf. Synchronises with the GPU."""
        if trainer.tloss is None:
            return
        if all(math.isfinite(mean) for mean in trainer.tloss.values()):
            self._means = trainer.tloss
        else:
            # None at the first batch: the mean starts with the next one
            trainer.tloss = self._means

    def close(self, trainer: Any) -> None:
        """Corrects the losses at the end of the epoch.

        Recovery is left to the trainer: a NaN loss stays if the weights are not finite, or if no
        step of the whole epoch was applied.
        """
        self.mend_means(trainer)
        if trainer.tloss is None:  # there was no good batch
            trainer.tloss = trainer.loss_items
        lost = trainer.loss is not None and not trainer.loss.isfinite()
        if lost and self._loss is not None and _is_finite(trainer.model):
            trainer.loss = self._loss


def _is_finite(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return all(bool(torch.isfinite(t).all()) for t in tensors)
