"""`UltralyticsGuard`: handles the events of a guarded Ultralytics trainer."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import ReplacedMethods
from fastguard.integrations.requested_limit import was_skipped
from fastguard.integrations.shared import RunRecords, guarded
from fastguard.integrations.ultralytics.epoch_losses import EpochLosses
from fastguard.records.step_record import StepRecord
from fastguard.recovery.guarded_lr import GuardedLR


class UltralyticsGuard:
    """The callbacks that guard a trainer.

    Attributes:
        optimizer: The guarded optimizer of the run, with its records and counters.
        lr: The learning rates used by its steps.
    """

    optimizer: GuardedOptimizer
    lr: GuardedLR

    def __init__(
        self, options: Mapping[str, Any], schedule: Mapping[str, Any], records: RunRecords
    ) -> None:
        self._options = options
        self._schedule = schedule
        self._records = records
        self._run: RunRecords | None = None
        # Number and image files of each batch of the next step.
        self._window: list[tuple[int, Sequence[str]]] = []

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Attaches the guard, after optimizer, scheduler and EMA have been created and loaded."""
        from ultralytics.utils import RANK

        self._trainer = trainer
        self.optimizer = guarded(
            trainer.optimizer,
            trainer.model,
            self._options,
            world_size=max(1, trainer.world_size),  # `world_size` is 0 on a CPU
            replicated=True,
        )
        self.lr = GuardedLR(trainer.scheduler, optimizer=self.optimizer, **self._schedule)
        if trainer.resume:
            self._resume(trainer.args.resume)
        self.optimizer.register_state_dict_post_hook(self._save_lr)
        ModelBuffers(trainer.model).follow(self.optimizer)
        self._losses = EpochLosses()
        file = self._records.records or trainer.save_dir / "records.jsonl"
        self._run = RunRecords(file, self._records.sinks)
        self._run.begin([self.optimizer], writes=RANK in (-1, 0), completed=self._with_images)
        trainer.optimizer = self.optimizer
        self._replaced = ReplacedMethods(trainer, self, ("optimizer_step", "preprocess_batch"))

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Starts an epoch. If the trainer restarts an epoch, discards existing gradients."""
        self._batch = 0
        self._losses = EpochLosses()
        if trainer.nan_recovery_attempts or trainer._oom_retries:
            self._window.clear()

    def on_train_batch_start(self, trainer: Any) -> None:
        """Counts the batch and repairs the running mean of the losses."""
        self._batch += 1
        self._losses.repair_means(trainer)

    def on_train_batch_end(self, trainer: Any) -> None:
        """Passes the loss to the guard if no step followed the batch (accumulation)."""
        if self._window:
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Corrects the epoch's losses before the trainer logs them and checks them for NaN."""
        self._losses.close(trainer)

    def teardown(self, trainer: Any) -> None:
        """Closes the records when training ends or fails."""
        if self._run is not None:
            self._run.end()

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Like the trainer's method; also keeps the names of the batch's images until its step."""
        self._window.append((self._batch, batch.get("im_file", ())))
        return self._replaced.original("preprocess_batch")(batch)

    def _observe(self, trainer: Any) -> None:
        self.optimizer.observe(trainer.loss_items)

    def optimizer_step(self) -> None:
        """Replaces the trainer's method, which clips to a fixed norm and always updates the EMA."""
        trainer = self._trainer
        self._observe(trainer)
        batches = [number for number, _ in self._window]
        span = batches[0] if len(batches) == 1 else f"{batches[0]}-{batches[-1]}"
        with self.lr.in_force():
            tag = {"epoch": trainer.epoch + 1, "batch": span}
            tag["global_step"] = self.optimizer.steps_taken + 1
            trainer.scaler.step(self.optimizer, tag=tag)
        trainer.scaler.update()
        self.optimizer.zero_grad()
        self.optimizer.settle()  # makes the record now, before the window is cleared
        if not was_skipped(self.optimizer):
            self._losses.applied(trainer)
            if trainer.ema:
                trainer.ema.update(trainer.model)
        self._window.clear()

    def _with_images(self, record: StepRecord) -> StepRecord:
        """Adds the names of the images to the record of a skipped incident."""
        if record.action != "skipped" or not record.is_incident:
            return record
        images = [name for _, names in self._window for name in names]
        return replace(record, tag={**record.tag, "images": images})

    def _save_lr(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["guarded_lr"] = self.lr.state_dict()

    def _resume(self, checkpoint: str) -> None:
        """Restores the guard's state, which the trainer does not load from its checkpoint."""
        from ultralytics.nn.tasks import load_checkpoint

        saved = load_checkpoint(checkpoint)[1]["optimizer"]
        state = {**self.optimizer.state_dict(), "fastguard": saved.get("fastguard")}
        self.optimizer.load_state_dict(state)
        if "guarded_lr" in saved:
            self.lr.load_state_dict(saved["guarded_lr"])
