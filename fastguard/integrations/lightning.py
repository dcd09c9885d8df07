"""Integration with Lightning's Trainer: `Trainer(callbacks=[GuardCallback()])`.

Every optimizer that `configure_optimizers` returns is guarded, in automatic and manual optimization
and with every precision plugin. Lightning's clipping (`gradient_clip_val` or `clip_gradients`) sets
a limit that the guard applies once, within the step. Per-step schedules wait for an applied step.
Running statistics are restored after a skipped step. The guard's state is saved with the state of
the optimizer. For Fabric, use `fastguard.integrations.fabric`. docs/lightning.md has complete
examples for the Trainer and for Fabric.

Tested with lightning 2.6.6.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import ReplacedMethods
from fastguard.integrations.requested_limit import RequestedLimit, total_norm_of, was_skipped
from fastguard.integrations.shared import (
    BatchSpan,
    RunRecords,
    Sink,
    StepTags,
    guarded,
    needs,
    optimizer_of_loss,
    refuse_deepspeed,
)

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden


class GuardCallback(Callback):
    """Guards the optimizers of each `fit`, and logs every step.

    Logs `train/grad_norm` (before clipping), `train/clip_coef` and `train/skipped_steps` (so far)
    without synchronizing with the GPU. With a per-step schedule, each step synchronizes, because
    the schedule waits for an applied step.

    Args:
        records: JSON lines file to which rank 0 appends each record; records of a second optimizer
            go to `records-1.jsonl` beside it. Default: None.
        sinks: Called with each record on rank 0, such as `TensorBoardSink("run")`.
        options: Arguments of `GuardedOptimizer`; `max_norm` defaults to the Trainer's
            `gradient_clip_val`. If given, all of Lightning's limits are ignored.

    Attributes:
        optimizers: The guarded optimizers of the last `fit`, for their records and counters.

    Raises:
        TypeError: `records` is not a path, or a sink is not callable.
        OSError: `records` is a folder.
    """

    def __init__(
        self,
        *,
        records: str | os.PathLike[str] | None = None,
        sinks: Sequence[Sink] = (),
        **options: Any,
    ) -> None:
        self.options = options
        self.optimizers: list[GuardedOptimizer] = []
        self._records = RunRecords(records, sinks)
        self._limits: list[RequestedLimit] = []
        self._spans: list[BatchSpan] = []
        self._skipped: list[Tensor] = []
        self._logged: list[int] = []
        self._trainer: Trainer | None = None
        self._statistics: ModelBuffers | None = None
        self._hooks: list[Any] = []
        self._replaced: list[ReplacedMethods] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._trainer is not None:  # the callback was copied in the middle of a fit
            self._attach()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the strategy before it creates an engine.

        Raises:
            ValueError: DeepSpeed takes the steps.
        """
        if stage == "fit":
            refuse_deepspeed(trainer.strategy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Guards the optimizers, which exist and have not loaded a checkpoint yet."""
        self.teardown()  # cleans up after a fit that ended without teardown
        # The placeholder for a `configure_optimizers` that returned None has no parameters.
        trainer.optimizers = [
            self._guarded(o, trainer, pl_module) if any(g["params"] for g in o.param_groups) else o
            for o in trainer.optimizers
        ]
        self.optimizers = [o for o in trainer.optimizers if isinstance(o, GuardedOptimizer)]
        fixed = "max_norm" in self.options
        self._limits = [RequestedLimit(optimizer, fixed=fixed) for optimizer in self.optimizers]
        self._spans = [BatchSpan() for _ in self.optimizers]
        self._trainer = trainer
        self._attach()
        # Replaces no method of the module, since users copy and save modules.
        self._replaced = [
            ReplacedMethods(trainer.precision_plugin, self, ["clip_gradients"]),
            ReplacedMethods(trainer.fit_loop.epoch_loop, self, ["update_lr_schedulers"]),
            *(
                _PlainNames(c).monitors
                for c in trainer.callbacks
                if isinstance(c, LearningRateMonitor)
            ),
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting from the current state, which a checkpoint may have restored."""
        self._records.begin(self.optimizers, writes=trainer.is_global_zero)
        self._skipped = [torch.tensor(float(o.skipped_steps)) for o in self.optimizers]
        self._logged = [optimizer.steps_taken for optimizer in self.optimizers]
        self._statistics = ModelBuffers(pl_module)
        self._detach()
        self._attach()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Passes the loss of a micro-batch to the guard if its optimizer is known."""
        for optimizer, span in zip(self.optimizers, self._spans, strict=True):
            _begin_batch(span, trainer)
            # With several optimizers, the loss belongs to an optimizer that has not stepped on this
            # batch.
            if len(self._spans) == 1 or not span.has_stepped:
                span.add(to=optimizer)
        optimizer = optimizer_of_loss(self.optimizers, loss, trainer.world_size)
        if optimizer is None:
            return
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches
        optimizer.observe(loss)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Logs the steps that were taken."""
        for i, optimizer in enumerate(self.optimizers):
            if optimizer.last is None or optimizer.steps_taken == self._logged[i]:
                continue
            self._logged[i] = optimizer.steps_taken
            which = f"/{i}" if len(self.optimizers) > 1 else ""
            seen = {
                "grad_norm": total_norm_of(optimizer.last),
                "clip_coef": optimizer.last.clip_coef.amin(),
                "skipped_steps": self._skipped[i],
            }
            # batch_size=1, since Lightning cannot infer the batch size if training_step takes a
            # dataloader_iter. Values per step do not use it.
            self.log_dict({f"train/{k}{which}": v for k, v in seen.items()}, batch_size=1)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Writes the last records and restores Lightning's own methods."""
        self._records.end()
        self._detach()
        for methods in self._replaced:
            methods.restore()
        self._replaced, self._trainer, self._statistics = [], None, None

    on_exception = teardown

    def _guarded(
        self, optimizer: Optimizer, trainer: Trainer, module: LightningModule
    ) -> GuardedOptimizer:
        limit = trainer.gradient_clip_val or None  # for Lightning, 0 means no limit
        if trainer.gradient_clip_algorithm == "value" or is_overridden(
            "configure_gradient_clipping", module
        ):
            limit = None  # in that case, Lightning passes the limit before each step
        return guarded(
            optimizer,
            module,
            self.options,
            world_size=trainer.world_size,
            replicated=isinstance(trainer.strategy, DDPStrategy),
            max_norm=limit,
        )

    def _attach(self) -> None:
        """Attaches the step hooks, which are not copied with an optimizer."""
        for i, optimizer in enumerate(self.optimizers):
            # loss={}, because on_before_backward has passed the losses of all micro-batches. The
            # closure returns only the last loss, divided by accumulate_grad_batches, and no loss
            # with a scaler.
            tag = partial(self._tag, i)
            self._hooks.append(StepTags(optimizer, tag, self._spans[i].clear, loss={}))
            if self._statistics is not None:  # true once training has started
                count = partial(self._count, i)
                self._hooks.append(optimizer.register_step_post_hook(count))
                self._statistics.follow(optimizer)

    def _detach(self) -> None:
        """Removes the hooks, since the next fit may use the same optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._statistics is not None:
            self._statistics.remove()

    def _tag(self, i: int) -> dict[str, Any]:
        """Returns the tag; `global_step` is the Trainer's counter after this step."""
        assert self._trainer is not None
        span = self._spans[i]
        _begin_batch(span, self._trainer)
        span.add()  # the backward pass may be part of the step's closure
        return span.tag(self._trainer.global_step + 1)

    def _count(self, i: int, *_: Any) -> None:
        last = self.optimizers[i].last
        if last is not None:
            self._skipped[i] = self._skipped[i].to(last.found_inf.device) + last.found_inf

    def clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> None:
        """Replaces the precision plugin's method, which refuses optimizers that can unscale."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        limit = next((limit for limit in self._limits if limit.optimizer is optimizer), None)
        if limit is not None and clip_val > 0:
            by_value = gradient_clip_algorithm == "value"
            (limit.request_value if by_value else limit.request_norm)(clip_val)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Replaces the training loop's method: a per-step schedule waits for an applied step."""
        if interval == "step" and self.optimizers and was_skipped(self.optimizers[0]):
            return
        theirs = self._replaced[1].original("update_lr_schedulers")
        theirs(interval=interval, update_plateau_schedulers=update_plateau_schedulers)


class _PlainNames:
    """Makes a `LearningRateMonitor` use the names of the wrapped optimizers."""

    def __init__(self, monitor: LearningRateMonitor) -> None:
        self.monitors = ReplacedMethods(monitor, self, ["_find_names_from_schedulers"])

    def _find_names_from_schedulers(self, configs: list[Any]) -> Any:
        plain = []
        for config in configs:
            optimizer = config.scheduler.optimizer
            # Lightning's wrapper is a subclass of the class that it wraps.
            while isinstance(optimizer, GuardedOptimizer):
                optimizer = optimizer.optimizer
            plain.append(replace(config, scheduler=SimpleNamespace(optimizer=optimizer)))
        return self.monitors.original("_find_names_from_schedulers")(plain)


def _begin_batch(span: BatchSpan, trainer: Trainer) -> None:
    span.begin(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)
