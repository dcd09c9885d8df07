"""fastguard inside Accelerate: every optimizer that `accelerator.prepare` gets is guarded.

Accelerate's own calls keep their meaning: `clip_grad_norm_` sets the limit that the guard applies
in the coming step, once; `optimizer.step_was_skipped` knows of the guard's skips, so that prepared
schedulers wait for a step that happens; `backward` lets the guard see the loss. What a bad batch
left in the running statistics of the model is taken back when its step is skipped.

Tested with accelerate 1.15.0.
"""
# Where the framework is not installed, pyright takes `accelerate` for this very file.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.clip import get_total_norm
from fastguard.integrations.clipping import AskedLimit, was_skipped
from fastguard.integrations.engines import engine_error
from fastguard.integrations.extras import needs
from fastguard.integrations.replicas import usual_group
from fastguard.integrations.running_statistics import RunningStatistics
from fastguard.optimizer import GuardedOptimizer

with needs("huggingface"):
    from accelerate import Accelerator, DistributedType
    from accelerate.optimizer import AcceleratedOptimizer

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class GuardedAcceleratedOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper around a guarded optimizer."""

    limit: AskedLimit

    @property
    def step_was_skipped(self) -> bool:
        """Whether the guard skipped the last step, for the scaler too. Waits for a GPU."""
        return was_skipped(self.optimizer)


class AcceleratorGuard:
    """Stands in for `prepare_optimizer`, `clip_grad_norm_` and `backward` of one accelerator.

    Args:
        accelerator: Before its `prepare` is called.
        model: Called for each new optimizer: the model whose parameters it has, if known.
        options: The arguments of each new `GuardedOptimizer`.
        fixed: Limits that the accelerator is asked for are ignored.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Callable[[], nn.Module | None],
        options: Mapping[str, Any],
        *,
        fixed: bool,
    ) -> None:
        if accelerator.distributed_type in ENGINES:
            raise engine_error(accelerator.distributed_type.value)
        if isinstance(getattr(accelerator.prepare_optimizer, "__self__", None), AcceleratorGuard):
            raise ValueError("this accelerator is guarded already")
        self.accelerator, self.model, self.options, self.fixed = accelerator, model, options, fixed
        self.prepared: weakref.WeakSet[GuardedAcceleratedOptimizer] = weakref.WeakSet()
        self._accelerates = {}
        for name in ("prepare_optimizer", "clip_grad_norm_", "backward"):
            self._accelerates[name] = getattr(accelerator, name)
            setattr(accelerator, name, getattr(self, name))

    def prepare_optimizer(
        self, optimizer: Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """As Accelerate's own."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return self._accelerates["prepare_optimizer"](optimizer, device_placement)
        model = self.model()
        if not isinstance(optimizer, GuardedOptimizer):
            names = None if model is None else model.named_parameters()
            ddp = self.accelerator.distributed_type.value.startswith("MULTI_")
            group = usual_group(self.options, self.accelerator.num_processes, replicated=ddp)
            usual = {"named_parameters": names, **group}
            optimizer = GuardedOptimizer(optimizer, **{**usual, **self.options})
        if model is not None:
            RunningStatistics(model).follow(optimizer)
        if device_placement is None:
            device_placement = self.accelerator.device_placement
        prepared = GuardedAcceleratedOptimizer(
            optimizer, device_placement=device_placement, scaler=self.accelerator.scaler
        )
        prepared.limit = AskedLimit(optimizer, fixed=self.fixed)
        prepared._is_accelerate_prepared = True  # so that Accelerate only enters it in its books
        self.prepared.add(prepared)
        return self._accelerates["prepare_optimizer"](prepared, device_placement)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """As Accelerate's own, but it is the guard that scales, in the coming step."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        wanted = {id(p) for p in parameters if p.grad is not None}
        for prepared in self.prepared:
            groups = prepared.param_groups
            if wanted == {id(p) for g in groups for p in g["params"] if p.grad is not None}:
                self.accelerator.unscale_gradients()
                prepared.limit.norm(max_norm, norm_type)
                return self.total_norm(prepared.optimizer, parameters)
        # Parameters of no one optimizer, or a part of one: there is no step to clip within.
        return self._accelerates["clip_grad_norm_"](parameters, max_norm, norm_type)

    def total_norm(self, optimizer: GuardedOptimizer, parameters: list[Tensor]) -> Tensor:
        """The norm that `clip_grad_norm_` returns, measured now: one more read of gradients."""
        grads = [p.grad for p in parameters if p.grad is not None]
        return get_total_norm(grads, optimizer.norm_type, group=optimizer.group)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """As Accelerate's own; the guard sees the loss, if it is clear whose it is."""
        if len(self.prepared) == 1 and loss.numel() == 1:
            (prepared,) = self.prepared
            # Losses of several ranks are joined over a group, so without one they stay unseen.
            if self.accelerator.num_processes == 1 or prepared.optimizer.group is not None:
                prepared.optimizer.observe(self.loss_of_batch(loss.detach()))
        self._accelerates["backward"](loss, **kwargs)

    def loss_of_batch(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch, whose mean over the micro-batches is that of the step."""
        return loss


def guard(accelerator: Accelerator, model: nn.Module | None = None, **options: Any) -> Accelerator:
    """Guards every optimizer that this accelerator prepares from now on; docs/huggingface.md.

    Args:
        accelerator: Before its `prepare` is called.
        model: What is trained, so that records name its parameters and its running statistics
            survive a skipped step; to be prepared before its optimizer, or with it and first.
        options: As for `GuardedOptimizer`. With a `max_norm` here, the limits that
            `accelerator.clip_grad_norm_` is called with are ignored.

    Raises:
        ValueError: It is guarded already, or an engine steps by itself (DeepSpeed, Megatron, XLA).
    """
    AcceleratorGuard(accelerator, lambda: model, options, fixed="max_norm" in options)
    return accelerator
