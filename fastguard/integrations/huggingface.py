"""fastguard inside the Trainer of transformers: `guard(trainer)` before `trainer.train()`.

The Trainer's optimizer is guarded when the Trainer makes it. `max_grad_norm` becomes the guard's
limit and is applied once; the logged `grad_norm` is what the guard measured in the step; schedulers
wait for a step that happens; the guard's state travels in `optimizer.pt`.

Tested with transformers 5.23.0 and accelerate 1.15.0.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastguard.integrations.clipping import total_norm_of
from fastguard.integrations.extras import needs
from fastguard.optimizer import GuardedOptimizer

with needs("huggingface"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback

    from fastguard.integrations.accelerate import AcceleratorGuard


class GuardCallback(TrainerCallback):
    """Brings what the guard measured into the Trainer's logs; `guard` makes it.

    Attributes:
        optimizer: The guarded optimizer once training has begun, for its records and counters.
    """

    def __init__(self) -> None:
        self.optimizer: GuardedOptimizer | None = None
        self._norm: Tensor | None = None

    def norm_to_come(self, device: torch.device) -> Tensor:
        """The norm of the step that comes, `()`: NaN until then."""
        self._norm = torch.full((), math.nan, device=device)
        return self._norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the guarded optimizer."""
        self.optimizer = getattr(kwargs["optimizer"], "optimizer", None)
        if not isinstance(self.optimizer, GuardedOptimizer):
            raise RuntimeError(
                "the Trainer has made a new accelerator since guard(trainer), as hyperparameter "
                "search does, so its optimizer is not guarded; call guard(trainer) again"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fills in the norm that the Trainer holds since it asked for clipping. Never waits."""
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
        logs.update(seen)  # type: ignore[union-attr]  # for the callbacks after this one
        state.log_history[-1].update(seen)


class TrainerGuard(AcceleratorGuard):
    """The guard of a Trainer's accelerator: the Trainer looks at the norm only after the step."""

    def __init__(self, trainer: Trainer, callback: GuardCallback, options: dict[str, Any]) -> None:
        self.trainer = trainer
        self.callback = callback
        limit = trainer.args.max_grad_norm or None  # 0 is the Trainer's word for no limit
        super().__init__(
            trainer.accelerator,
            lambda: trainer.model,
            {"max_norm": limit, **options},
            fixed="max_norm" in options,
        )

    def total_norm(self, optimizer: GuardedOptimizer, parameters: list[Tensor]) -> Tensor:
        """What the coming step will measure: no read of its own."""
        return self.callback.norm_to_come(parameters[0].device)

    def loss_of_batch(self, loss: Tensor) -> Tensor:
        """The Trainer divides before it calls backward; the mean is to be the loss of the step."""
        return loss * self.trainer.current_gradient_accumulation_steps


def guard(trainer: Trainer, **options: Any) -> GuardCallback:
    """Guards the optimizer of a Trainer.

    Args:
        trainer: Before `train()`.
        options: As for `GuardedOptimizer`; `max_norm` defaults to the Trainer's `max_grad_norm`,
            which is ignored if it is given here.

    Returns:
        The callback that was added; its `optimizer` has the records and counters.

    Raises:
        ValueError: It is guarded already, or DeepSpeed steps by itself.

    docs/huggingface.md has a complete example.
    """
    callback = GuardCallback()
    TrainerGuard(trainer, callback, options)
    while isinstance(trainer.optimizer, AcceleratedOptimizer):  # of an earlier, unguarded train()
        trainer.optimizer = trainer.optimizer.optimizer
    # First, so that the reporters among the callbacks see what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
