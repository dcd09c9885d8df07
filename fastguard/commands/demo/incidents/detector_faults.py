"""Corrupts batches of the detector, through callbacks of the Ultralytics trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor


class Kind(Enum):
    """Kinds of faulty batches."""

    OVERFLOW = "the class branch returns Inf, as half precision does above 65504"
    BAD_PIXEL = "one pixel of one image is NaN"


class Faults:
    """Corrupts batches.

    Args:
        at: The kind of fault by epoch and batch, both counted from 1 as in the progress bar.
    """

    def __init__(self, at: Mapping[tuple[int, int], Kind]) -> None:
        self.at = at
        self._batch = 0
        self._now: Kind | None = None

    def attach(self, model: Any) -> None:
        """Adds the callbacks; call before `model.train(...)`."""
        for event in ("on_pretrain_routine_end", "on_train_epoch_start", "on_train_batch_start"):
            model.add_callback(event, getattr(self, event))

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Hooks into the preprocessing and the class branches of the model."""
        preprocess = trainer.preprocess_batch
        trainer.preprocess_batch = lambda batch: self._spoil_image(preprocess(batch))
        for branch in trainer.model.model[-1].cv3:
            branch.register_forward_hook(self._overflow)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Restarts the count of batches."""
        self._batch = 0

    def on_train_batch_start(self, trainer: Any) -> None:
        """Selects the fault of the batch."""
        self._batch += 1
        self._now = self.at.get((trainer.epoch + 1, self._batch))

    def _spoil_image(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._now is Kind.BAD_PIXEL:
            batch["img"][0, 0, 3, 3] = math.nan
        return batch

    def _overflow(self, module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        return output * math.inf if module.training and self._now is Kind.OVERFLOW else None
