"""Integration with the Trainer of transformers: `guard(trainer)` before `trainer.train()`.

The Trainer's optimizer is guarded when it is created. `max_grad_norm` becomes the guard's limit.
The logged `grad_norm` is the norm that the guard measured in the step. Schedulers wait for an
applied step. The guard's state is saved in `optimizer.pt`.

Tested with transformers 5.23.0 and accelerate 1.15.0.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.guard.guarded import GuardedOptimizer
from fastguard.integrations.requested_limit import total_norm_of
from fastguard.integrations.shared import RunRecords, Sink, needs

with needs("huggingface"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import has_length

    from fastguard.integrations.accelerate import AcceleratorGuard, GuardedAcceleratedOptimizer


class GuardCallback(TrainerCallback):
    """Adds the guard's measurements to the Trainer's logs; created by `guard`.

    Attributes:
        optimizer: The guarded optimizer once training has started, for its records and counters.
    """

    def __init__(self) -> None:
        self.optimizer: GuardedOptimizer | None = None
        self._guard: TrainerGuard | None = None
        self._norm: Tensor | None = None

    def next_norm(self, device: torch.device) -> Tensor:
        """Returns a tensor `()` that will hold the norm of the next step; NaN until then."""
        self._norm = torch.full((), math.nan, device=device)
        return self._norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the guarded optimizer."""
        self.optimizer = getattr(kwargs["optimizer"], "optimizer", None)
        if not isinstance(self.optimizer, GuardedOptimizer):
            raise RuntimeError(
                "the Trainer has created a new accelerator since guard(trainer), as hyperparameter "
                "search does, so its optimizer is not guarded; call guard(trainer) again"
            )
        assert self._guard is not None
        self._guard.begin_training(kwargs["optimizer"], args, state, kwargs["train_dataloader"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts epochs, for the tags of records."""
        assert self._guard is not None
        self._guard.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts batches, for the tags of records."""
        assert self._guard is not None
        self._guard.begin_next_batch()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the next micro-batch of the same step."""
        self.on_step_begin(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the last records."""
        assert self._guard is not None
        self._guard.records.end()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fills in the tensor that the Trainer received as the norm. Never syncs."""
        if self._norm is not None and self.optimizer is not None and self.optimizer.last:
            self._norm.copy_(total_norm_of(self.optimizer.last))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Adds `skipped_steps` (so far) and `clip_coef` (of the last step) to training logs."""
        if self.optimizer is None or self.optimizer.last is None or "loss" not in (logs or {}):
            return
        seen = {
            "skipped_steps": self.optimizer.skipped_steps,
            "clip_coef": self.optimizer.last.clip_coef.amin().item(),
        }
        logs.update(seen)  # type: ignore[union-attr]  # passes them to the callbacks after this one
        state.log_history[-1].update(seen)


class TrainerGuard(AcceleratorGuard):
    """The guard of a Trainer's accelerator. The Trainer reads the norm after the step."""

    def __init__(
        self,
        trainer: Trainer,
        callback: GuardCallback,
        options: dict[str, Any],
        records: RunRecords,
    ) -> None:
        self.trainer = trainer
        self.callback = callback
        self._epoch, self._batch = -1, 0  # the next batch
        # first batch of the first epoch; a resumed run may start in the middle
        self._first_batch = 0
        limit = trainer.args.max_grad_norm or None  # for the Trainer, 0 means no limit
        super().__init__(
            trainer.accelerator,
            {"max_norm": limit, **options},
            records,
            fixed="max_norm" in options,
        )
        callback._guard = self

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainerGuard:
        # A copied Trainer shares the accelerator with the original.
        twin = memo[id(self)] = TrainerGuard.__new__(TrainerGuard)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    @property
    def model(self) -> nn.Module | None:
        """The Trainer's model, which it may replace."""
        return self.trainer.model

    def begin_training(
        self, prepared: GuardedAcceleratedOptimizer, args: Any, state: Any, loader: Any
    ) -> None:
        """Starts training; a resumed run may start in the middle of an epoch."""
        if prepared.guard is not self:
            # The Trainer is a copy. It shares the accelerator with the original, which must not
            # train at the same time.
            prepared.guard.prepared.pop(prepared, None)
            self.records: RunRecords = prepared.guard.records
            prepared.guard = self
            self.prepared: weakref.WeakKeyDictionary[GuardedAcceleratedOptimizer, None]
            self.prepared = weakref.WeakKeyDictionary({prepared: None})
        self._replaced.install()
        self.open_records()
        done = state.epoch or 0.0
        self._epoch = math.floor(done + 1e-6)
        steps = len(loader) if has_length(loader) else args.max_steps
        skipped = 0 if args.ignore_data_skip else round((done - self._epoch) * steps)
        self._first_batch = max(0, skipped)
        self._epoch -= 1

    def begin_epoch(self) -> None:
        """Starts the next pass over the data."""
        self._epoch += 1
        self._batch, self._first_batch = self._first_batch, 0

    def begin_next_batch(self) -> None:
        """Starts the forward and backward pass of the next batch."""
        self.begin_batch(self._epoch, self._batch)
        self._batch += 1

    def count_batch(self) -> None:
        """Does nothing, since the callback counts batches."""

    def step_number(self, optimizer: GuardedOptimizer) -> int:
        """Returns the Trainer's counter after the next step."""
        return self.trainer.state.global_step + 1

    def total_norm(self, optimizer: GuardedOptimizer, parameters: list[Tensor]) -> Tensor:
        """Returns a tensor that receives the norm of the next step, which avoids a read."""
        return self.callback.next_norm(parameters[0].device)

    def loss_of_batch(self, loss: Tensor) -> Tensor:
        """Undoes the Trainer's division, so that the mean over micro-batches is the step's loss."""
        return loss * self.trainer.current_gradient_accumulation_steps


def guard(
    trainer: Trainer,
    *,
    records: str | os.PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> GuardCallback:
    """Guards the optimizer of a Trainer.

    Args:
        trainer: The Trainer, before `train()`.
        records: JSON lines file to which the main process appends each record. Default: None.
        sinks: Called with each record on the main process, such as `TensorBoardSink("run")`.
        options: Arguments of `GuardedOptimizer`; `max_norm` defaults to the Trainer's
            `max_grad_norm`, and replaces it if given.

    Returns:
        The callback that was added; its `optimizer` has the records and counters.

    Raises:
        TypeError: `records` is not a path, or a sink is not callable.
        OSError: `records` is a folder.
        ValueError: The Trainer is already guarded, or DeepSpeed takes the steps.

    docs/huggingface.md has a complete example.
    """
    callback = GuardCallback()
    TrainerGuard(trainer, callback, options, RunRecords(records, sinks))
    # an earlier, unguarded train() has wrapped the model
    while isinstance(trainer.optimizer, AcceleratedOptimizer):
        trainer.optimizer = trainer.optimizer.optimizer
    # Added first, so that reporting callbacks see its additions to the logs.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
