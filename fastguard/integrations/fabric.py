"""fastguard inside Lightning Fabric: every optimizer that `fabric.setup` gets is guarded.

`fabric.clip_gradients` sets the limit that the guard applies in the coming step, once, with every
precision; `fabric.backward` lets the guard see the loss. What a bad batch left in the running
statistics of the model is taken back when its step is skipped.

Tested with lightning 2.6.6.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.clip import get_total_norm
from fastguard.integrations.clipping import AskedLimit
from fastguard.integrations.engines import refuse_deepspeed
from fastguard.integrations.extras import needs
from fastguard.integrations.replicas import usual_group
from fastguard.integrations.running_statistics import RunningStatistics
from fastguard.optimizer import GuardedOptimizer

with needs("lightning"):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy


class FabricGuard:
    """Stands in for five methods of a Fabric's strategy.

    Args:
        fabric: Before its `setup` is called.
        model: What is trained, if it is one.
        options: The arguments of each new `GuardedOptimizer`.
    """

    def __init__(self, fabric: Fabric, model: nn.Module | None, options: dict[str, Any]) -> None:
        strategy = fabric.strategy
        refuse_deepspeed(strategy)
        if isinstance(getattr(strategy.setup_optimizer, "__self__", None), FabricGuard):
            raise ValueError("this Fabric is guarded already")
        self.strategy, self.model, self.options = strategy, model, options
        self.limits: dict[GuardedOptimizer, AskedLimit] = {}
        self._fabrics = {}
        for name in (
            "setup_module_and_optimizers",
            "setup_optimizer",
            "clip_gradients_norm",
            "clip_gradients_value",
            "backward",
        ):
            self._fabrics[name] = getattr(strategy, name)
            setattr(strategy, name, getattr(self, name))

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], *rest: Any
    ) -> tuple[Any, ...]:
        """As the strategy's own; FSDP's does not set up the optimizers that come with a module."""
        theirs = self._fabrics["setup_module_and_optimizers"]
        module, optimizers, *rest_of_it = theirs(module, optimizers, *rest)
        guarded = [o if o in self.limits else self.setup_optimizer(o) for o in optimizers]
        return module, guarded, *rest_of_it

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """As the strategy's own."""
        if not isinstance(optimizer, GuardedOptimizer):
            names = None if self.model is None else self.model.named_parameters()
            ddp = isinstance(self.strategy, DDPStrategy)
            world_size = getattr(self.strategy, "world_size", 1)
            group = usual_group(self.options, world_size, replicated=ddp)
            usual = {"named_parameters": names, **group}
            optimizer = GuardedOptimizer(optimizer, **{**usual, **self.options})
        if self.model is not None:
            RunningStatistics(self.model).follow(optimizer)
        self.limits[optimizer] = AskedLimit(optimizer, fixed="max_norm" in self.options)
        return self._fabrics["setup_optimizer"](optimizer)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: GuardedOptimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the strategy's own, but it is the guard that scales, in the coming step.

        `error_if_nonfinite` is ignored: what non-finite gradients do is the guard's `nonfinite`.
        """
        self.limits[optimizer].norm(max_norm, norm_type)
        self._unscale(optimizer)
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        return get_total_norm(grads, norm_type, group=optimizer.group)

    def clip_gradients_value(
        self, module: nn.Module, optimizer: GuardedOptimizer, clip_val: float
    ) -> None:
        """As the strategy's own, but it is the guard that clamps, in the coming step."""
        self.limits[optimizer].value(clip_val)

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """As the strategy's own; the guard sees the loss, if it is clear whose it is."""
        if len(self.limits) == 1 and tensor.numel() == 1:
            (optimizer,) = self.limits
            # Losses of several ranks are joined over a group, so without one they stay unseen.
            if getattr(self.strategy, "world_size", 1) == 1 or optimizer.group is not None:
                optimizer.observe(tensor.detach())
        self._fabrics["backward"](tensor, module, *args, **kwargs)

    def _unscale(self, optimizer: GuardedOptimizer) -> None:
        """Not through the precision plugin: it refuses an optimizer that can unscale itself."""
        scaler = getattr(self.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)


def guard(fabric: Fabric, model: nn.Module | None = None, **options: Any) -> Fabric:
    """Guards every optimizer that this Fabric sets up from now on; docs/lightning.md.

    Args:
        fabric: Before its `setup` is called.
        model: What is trained, so that records name its parameters and its running statistics
            survive a skipped step; to be set up before its optimizer, or with it.
        options: As for `GuardedOptimizer`. With a `max_norm` here, the limits that
            `fabric.clip_gradients` is called with are ignored.

    Raises:
        ValueError: It is guarded already, or DeepSpeed steps by itself.
    """
    FabricGuard(fabric, model, options)
    return fabric
