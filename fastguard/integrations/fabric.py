"""Integration with Lightning Fabric: every optimizer that `fabric.setup` receives is guarded.

`fabric.clip_gradients` sets a limit that the guard applies once, in the next step, with every
precision. `fabric.backward` passes the loss to the guard. When a step is skipped, changes that the
bad batch made to running statistics are undone.

Tested with lightning 2.6.6.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.functional.clip import get_total_norm
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import ReplacedMethods
from fastguard.integrations.requested_limit import RequestedLimit
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
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.wrappers import _FabricDataLoader


class FabricGuard:
    """Replaces two methods of a Fabric and four of its strategy.

    The strategy's `backward` is not replaced, because Fabric forbids a plain `loss.backward()` for
    strategies that override it.

    Args:
        fabric: The Fabric, before its `setup` is called.
        model: The model being trained, or None.
        options: Arguments of each new `GuardedOptimizer`.
        records: Destinations of the records.
    """

    def __init__(
        self, fabric: Fabric, model: nn.Module | None, options: dict[str, Any], records: RunRecords
    ) -> None:
        strategy = fabric.strategy
        refuse_deepspeed(strategy)
        if isinstance(getattr(strategy.setup_optimizer, "__self__", None), FabricGuard):
            raise ValueError("this Fabric is already guarded")
        self.strategy: Any = strategy
        self.model: nn.Module | None = model
        self.options: dict[str, Any] = options
        self.records = records
        self.spans: dict[GuardedOptimizer, BatchSpan] = {}
        self.limits: dict[GuardedOptimizer, RequestedLimit] = {}
        self._statistics: dict[GuardedOptimizer, ModelBuffers] = {}
        self._fabric_methods = ReplacedMethods(fabric, self, ("backward", "setup_dataloaders"))
        self._strategy_methods = ReplacedMethods(
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
        """Number of training processes; 1 for strategies that do not define it."""
        return getattr(self.strategy, "world_size", 1)

    def setup_dataloaders(self, *dataloaders: Any, **kwargs: Any) -> Any:
        """Like Fabric's method; the loaders also report which batch they return."""
        loaders = self._fabric_methods.original("setup_dataloaders")(*dataloaders, **kwargs)
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            if type(loader) is _FabricDataLoader:
                loader.__class__ = _ReportingDataLoader
                loader.fastguard_begin = self.begin_batch
        return loaders

    def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """Like Fabric's method; also passes the loss to the guard if its optimizer is known."""
        for optimizer, span in self.spans.items():
            span.add(to=optimizer)
        optimizer = optimizer_of_loss(list(self.limits), tensor, self.world_size)
        if optimizer is not None:
            optimizer.observe(tensor.detach())
        self._fabric_methods.original("backward")(tensor, *args, **kwargs)

    def begin_batch(self, epoch: int, batch: int) -> None:
        """Sets the current batch, which a data loader returns next."""
        for span in self.spans.values():
            span.begin(epoch, batch)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], *rest: Any
    ) -> tuple[Any, ...]:
        """Like the strategy's method; also guards optimizers that it did not set up (FSDP)."""
        setup = self._strategy_methods.original("setup_module_and_optimizers")
        module, optimizers, *others = setup(module, optimizers, *rest)
        guarded = [o if o in self.limits else self.setup_optimizer(o) for o in optimizers]
        return module, guarded, *others

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Sets up an optimizer like the strategy's method, guarded."""
        optimizer = guarded(
            optimizer,
            self.model,
            self.options,
            world_size=self.world_size,
            replicated=isinstance(self.strategy, DDPStrategy),
        )
        if self.model is not None:
            self._statistics[optimizer] = ModelBuffers(self.model)
        self.limits[optimizer] = RequestedLimit(optimizer, fixed="max_norm" in self.options)
        self.spans[optimizer] = BatchSpan()
        self._attach(optimizer)
        self.records.begin(list(self.limits), writes=self.strategy.is_global_zero)
        return self._strategy_methods.original("setup_optimizer")(optimizer)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: GuardedOptimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Like the strategy's method, but the guard scales the gradients in the next step.

        `error_if_nonfinite` is ignored: the guard's `nonfinite` decides about non-finite gradients.
        """
        self.limits[optimizer].request_norm(max_norm, norm_type)
        self._unscale(optimizer)
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        return get_total_norm(grads, norm_type, group=optimizer.group)

    def clip_gradients_value(
        self, module: nn.Module, optimizer: GuardedOptimizer, clip_val: float
    ) -> None:
        """Like the strategy's method, but the guard clamps the gradients in the next step."""
        self.limits[optimizer].request_value(clip_val)

    def _attach(self, optimizer: GuardedOptimizer) -> None:
        """Attaches the step hooks, which are not copied with an optimizer."""
        if optimizer in self._statistics:
            self._statistics[optimizer].follow(optimizer)
        span = self.spans[optimizer]
        StepTags(optimizer, lambda: span.tag(optimizer.steps_taken + 1), span.clear)

    def _unscale(self, optimizer: GuardedOptimizer) -> None:
        """Unscales gradients without the precision plugin, which refuses a guarded optimizer."""
        scaler = getattr(self.strategy.precision, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)


class _ReportingDataLoader(_FabricDataLoader):
    """Fabric's data loader; also tells the guard which batch it returns."""

    fastguard_begin: Callable[[int, int], None]

    def __iter__(self) -> Iterator[Any]:
        epoch = self._num_iter_calls
        for batch, item in enumerate(super().__iter__()):
            if torch.is_grad_enabled():  # no batches are counted in validation
                self.fastguard_begin(epoch, batch)
            yield item


def guard(
    fabric: Fabric,
    model: nn.Module | None = None,
    *,
    records: str | os.PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> Fabric:
    """Guards every optimizer that this Fabric sets up from now on; see docs/lightning.md.

    Args:
        fabric: The Fabric, before its `setup` is called.
        model: The model being trained, so that records name its parameters and a skipped step
            restores its running statistics. Set it up before its optimizer, or in the same call.
            Default: None.
        records: JSON lines file to which rank 0 appends each record. Default: None.
        sinks: Called with each record on rank 0, such as `TensorBoardSink("run")`.
        options: Arguments of `GuardedOptimizer`. If they include `max_norm`, limits passed to
            `fabric.clip_gradients` are ignored.

    Returns:
        The same Fabric.

    Raises:
        TypeError: `records` is not a path, or a sink is not callable.
        OSError: `records` is a folder.
        ValueError: The Fabric is already guarded, or DeepSpeed takes the steps.
    """
    FabricGuard(fabric, model, options, RunRecords(records, sinks))
    return fabric
