"""fastguard inside Lightning's Trainer: `Trainer(callbacks=[GuardCallback()])`.

Every optimizer that `configure_optimizers` returns is guarded, in automatic and manual optimization
and with every precision plugin. Lightning's clipping, by `gradient_clip_val` or `clip_gradients`,
sets the limit that the guard applies within the step, once; schedules by step wait for a step that
happens; running statistics forget a skipped one; the guard's state is saved with the optimizer's.
For Fabric: `fastguard.integrations.fabric`. Complete examples of both are in docs/lightning.md.

Tested with lightning 2.6.6.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.integrations.clipping import AskedLimit, total_norm_of, was_skipped
from fastguard.integrations.engines import refuse_deepspeed
from fastguard.integrations.extras import needs
from fastguard.integrations.replaced import replaced
from fastguard.integrations.replicas import usual_group
from fastguard.integrations.running_statistics import RunningStatistics
from fastguard.optimizer import GuardedOptimizer

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden


class GuardCallback(Callback):
    """Guards the optimizers of each `fit`, and logs what it saw of each step.

    Logs `train/grad_norm` (before clipping), `train/clip_coef` and `train/skipped_steps` (so far),
    without waiting for a GPU; a schedule by step and running statistics read each verdict.

    Args:
        options: As for `GuardedOptimizer`; `max_norm` defaults to the Trainer's
            `gradient_clip_val`; if it is given here, what Lightning asks for is ignored.

    Attributes:
        optimizers: The guarded optimizers of the last `fit`, for their records and counters.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.optimizers: list[GuardedOptimizer] = []
        self._limits: list[AskedLimit] = []
        self._skipped: list[Tensor] = []
        self._logged: list[int] = []
        self._replaced = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the strategy makes an engine.

        Raises:
            ValueError: To train through DeepSpeed, which steps by itself.
        """
        if stage == "fit":
            refuse_deepspeed(trainer.strategy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Guards the optimizers, which exist by now; a checkpoint is loaded into them later."""
        self.optimizers = [self._guarded(o, trainer, pl_module) for o in trainer.optimizers]
        trainer.optimizers = list(self.optimizers)
        fixed = "max_norm" in self.options
        self._limits = [AskedLimit(optimizer, fixed=fixed) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            # Its closure returns the loss divided by accumulate_grad_batches, of the last
            # micro-batch alone, and with a scaler nothing: on_before_backward sees them all.
            optimizer.step = partial(optimizer.step, loss={})  # type: ignore[method-assign]
        waiting = partial(self._lr_scheduler_step, trainer, pl_module.lr_scheduler_step)
        replace, plugin = self._replaced.enter_context, trainer.precision_plugin
        replace(replaced(plugin, "clip_gradients", self._clip_gradients))
        replace(replaced(pl_module, "lr_scheduler_step", waiting))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the state that may have been restored as the one to count and go back from."""
        statistics = RunningStatistics(pl_module)
        self._skipped = [torch.tensor(float(o.skipped_steps)) for o in self.optimizers]
        self._logged = [optimizer.steps_taken for optimizer in self.optimizers]
        for i, optimizer in enumerate(self.optimizers):
            optimizer.register_step_post_hook(partial(self._count, i))
            statistics.follow(optimizer)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Shows the guard the loss of a micro-batch, if it is clear whose, and of which group."""
        joined = trainer.world_size == 1 or self.optimizers[0].group is not None
        if len(self.optimizers) != 1 or loss.numel() != 1 or not joined:
            return
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches
        self.optimizers[0].observe(loss)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Logs the steps that were taken."""
        for i, optimizer in enumerate(self.optimizers):
            if optimizer.last is None or optimizer.steps_taken == self._logged[i]:
                continue
            self._logged[i] = optimizer.steps_taken
            which = f"/{i}" if len(self.optimizers) > 1 else ""
            self.log(f"train/grad_norm{which}", total_norm_of(optimizer.last))
            self.log(f"train/clip_coef{which}", optimizer.last.clip_coef.amin())
            self.log(f"train/skipped_steps{which}", self._skipped[i])

    def teardown(self, *_: Any, **__: Any) -> None:
        """Gives Lightning its own methods back."""
        self._replaced.close()

    on_exception = teardown

    def _guarded(
        self, optimizer: Optimizer, trainer: Trainer, module: LightningModule
    ) -> GuardedOptimizer:
        if isinstance(optimizer, GuardedOptimizer):
            return optimizer
        limit = trainer.gradient_clip_val or None  # 0 is Lightning's word for no limit
        if trainer.gradient_clip_algorithm == "value" or is_overridden(
            "configure_gradient_clipping", module
        ):
            limit = None  # then Lightning says before each step what holds for it
        ddp = isinstance(trainer.strategy, DDPStrategy)
        group = usual_group(self.options, trainer.world_size, replicated=ddp)
        usual = {"max_norm": limit, "named_parameters": module.named_parameters(), **group}
        return GuardedOptimizer(optimizer, **{**usual, **self.options})

    def _count(self, i: int, *_: Any) -> None:
        last = self.optimizers[i].last
        if last is not None:
            self._skipped[i] = self._skipped[i].to(last.found_inf.device) + last.found_inf

    def _clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> None:
        """In place of the precision plugin's, which refuses an optimizer that unscales itself."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        limit = next(limit for limit in self._limits if limit.optimizer is optimizer)
        if clip_val > 0:
            (limit.value if gradient_clip_algorithm == "value" else limit.norm)(clip_val)

    def _lr_scheduler_step(self, trainer: Trainer, step: Any, scheduler: Any, metric: Any) -> None:
        configs = trainer.lr_scheduler_configs
        by_step = any(c.scheduler is scheduler and c.interval == "step" for c in configs)
        if not (by_step and was_skipped(self.optimizers[0])):
            step(scheduler, metric)
