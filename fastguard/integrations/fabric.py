"""fastguard inside Lightning Fabric: every optimizer that `fabric.setup` gets is guarded.

`fabric.clip_gradients` sets the limit that the guard applies in the coming step, once, with every
precision; `fabric.backward` lets the guard see the loss. What a bad batch left in the running
statistics of the model is taken back when its step is skipped.

Tested with lightning 2.6.6.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.functional.clip import get_total_norm
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import TakenOver
from fastguard.integrations.requested_limit import AskedLimit
from fastguard.integrations.shared import (
    BatchSpan,
    RunRecords,
    Sink,
    StepTags,
    alone_in_training,
    guarded,
    needs,
    refuse_deepspeed,
)

with needs("lightning"):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.wrappers import _FabricDataLoader


class FabricGuard:
    """Stands in for two methods of a Fabric, and four of its strategy.

    Not for the strategy's `backward`: Fabric takes a strategy with one of its own for one that a
    plain `loss.backward()` would bypass, and forbids it.

    Args:
        fabric: Before its `setup` is called.
        model: What is trained, if it is one.
        options: The arguments of each new `GuardedOptimizer`.
        records: Where the records of the run go.
    """

    def __init__(
        self, fabric: Fabric, model: nn.Module | None, options: dict[str, Any], records: RunRecords
    ) -> None:
        strategy = fabric.strategy
        refuse_deepspeed(strategy)
        if isinstance(getattr(strategy.setup_optimizer, "__self__", None), FabricGuard):
            raise ValueError("this Fabric is guarded already")
        self.strategy, self.model, self.options = strategy, model, options
        self.records = records
        self.span = BatchSpan()
        self.limits: dict[GuardedOptimizer, AskedLimit] = {}
        self._statistics: dict[GuardedOptimizer, ModelBuffers] = {}
        self._fabrics = TakenOver(fabric, self, ("backward", "setup_dataloaders"))
        self._strategys = TakenOver(
            strategy,
            self,
            (
                "setup_module_and_optimizers",
                "setup_optimizer",
                "clip_gradients_norm",
                "clip_gradients_value",
            ),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for optimizer in self.limits:
            self._attach(optimizer)

    @property
    def world_size(self) -> int:
        """How many processes train; a strategy of one device does not say."""
        return getattr(self.strategy, "world_size", 1)

    def setup_dataloaders(self, *dataloaders: Any, **kwargs: Any) -> Any:
        """As Fabric's own; they tell which batch they hand out."""
        loaders = self._fabrics.own("setup_dataloaders")(*dataloaders, **kwargs)
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            if type(loader) is _FabricDataLoader:
                loader.__class__ = _TellingDataLoader
                loader.fastguard_span = self.span
        return loaders

    def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Fabric's own; the guard sees the loss, if it is clear whose it is."""
        self.span.add()
        optimizer = alone_in_training(list(self.limits), tensor, self.world_size)
        if optimizer is not None:
            optimizer.observe(tensor.detach())
        self._fabrics.own("backward")(tensor, *args, **kwargs)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], *rest: Any
    ) -> tuple[Any, ...]:
        """As the strategy's own; FSDP's does not set up the optimizers that come with a module."""
        theirs = self._strategys.own("setup_module_and_optimizers")
        module, optimizers, *rest_of_it = theirs(module, optimizers, *rest)
        ours = [o if o in self.limits else self.setup_optimizer(o) for o in optimizers]
        return module, ours, *rest_of_it

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """As the strategy's own."""
        optimizer = guarded(
            optimizer,
            self.model,
            self.options,
            world_size=self.world_size,
            replicated=isinstance(self.strategy, DDPStrategy),
        )
        if self.model is not None:
            self._statistics[optimizer] = ModelBuffers(self.model)
        self.limits[optimizer] = AskedLimit(optimizer, fixed="max_norm" in self.options)
        self._attach(optimizer)
        self.records.begin(list(self.limits), writes=self.strategy.is_global_zero)
        return self._strategys.own("setup_optimizer")(optimizer)

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

    def _attach(self, optimizer: GuardedOptimizer) -> None:
        """Hooks what goes with a step into the optimizer; copies of an optimizer have no hooks."""
        if optimizer in self._statistics:
            self._statistics[optimizer].follow(optimizer)
        StepTags(
            optimizer, lambda: self.span.tag(optimizer.steps_taken + 1), lambda: self.span.clear()
        )

    def _unscale(self, optimizer: GuardedOptimizer) -> None:
        """Not through the precision plugin: it refuses an optimizer that can unscale itself."""
        scaler = getattr(self.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)


class _TellingDataLoader(_FabricDataLoader):
    """Fabric's data loader, which also tells the guard which batch it hands out."""

    fastguard_span: BatchSpan

    def __iter__(self) -> Iterator[Any]:
        epoch = self._num_iter_calls
        for batch, item in enumerate(super().__iter__()):
            if torch.is_grad_enabled():  # else it is validation, perhaps before a step
                self.fastguard_span.begin(epoch, batch)
            yield item


def guard(
    fabric: Fabric,
    model: nn.Module | None = None,
    *,
    records: str | os.PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> Fabric:
    """Guards every optimizer that this Fabric sets up from now on; docs/lightning.md.

    Args:
        fabric: Before its `setup` is called.
        model: What is trained, so that records name its parameters and its running statistics
            survive a skipped step; to be set up before its optimizer, or with it.
        records: File of JSON lines that rank 0 appends each record to.
        sinks: Called with each record on rank 0, such as `TensorBoardSink("run")`.
        options: As for `GuardedOptimizer`. With a `max_norm` here, the limits that
            `fabric.clip_gradients` is called with are ignored.

    Raises:
        TypeError: `records` is no path, or a sink cannot be called.
        OSError: `records` is a folder.
        ValueError: It is guarded already, or DeepSpeed steps by itself.
    """
    FabricGuard(fabric, model, options, RunRecords(records, sinks))
    return fabric
