"""Integration with Accelerate: every optimizer that `accelerator.prepare` receives is guarded.

The training loop does not change. `clip_grad_norm_` sets a limit that the guard applies once, in
the next step. `optimizer.step_was_skipped` includes the guard's skips, so prepared schedulers wait
for an applied step. `backward` passes the loss to the guard. When a step is skipped, changes that
the bad batch made to running statistics are undone.

Tested with accelerate 1.15.0.
"""
# If the framework is not installed, pyright resolves `accelerate` to this file.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.errors.logger import log
from fastguard.functional.clip import get_total_norm
from fastguard.guard.flat_step import FlatStep
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import ReplacedMethods
from fastguard.integrations.requested_limit import RequestedLimit, was_skipped
from fastguard.integrations.shared import (
    BatchSpan,
    RunRecords,
    Sink,
    StepTags,
    engine_error,
    guarded,
    needs,
    optimizer_of_loss,
)

with needs("huggingface"):
    from accelerate import Accelerator, DistributedType
    from accelerate.optimizer import AcceleratedOptimizer

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
METHODS = (
    "prepare_optimizer",
    "clip_grad_norm_",
    "backward",
    "end_training",
    "get_state_dict",
    "load_state",
)


class GuardedAcceleratedOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper around a guarded optimizer."""

    limit: RequestedLimit
    span: BatchSpan
    statistics: ModelBuffers | None
    guard: AcceleratorGuard

    @property
    def step_was_skipped(self) -> bool:
        """Whether the guard skipped the last step, also used by the scaler. Syncs with the GPU."""
        return was_skipped(self.optimizer)

    def attach(self) -> None:
        """Attaches the step hooks, which are not copied with an optimizer."""
        if self.statistics is not None:
            self.statistics.follow(self.optimizer)
        StepTags(self.optimizer, self._tag, self.span.clear)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler replaces `step` on the instance. A copy of that `step` would step the
        # original.
        return {name: v for name, v in super().__getstate__().items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.attach()

    def _tag(self) -> dict[str, Any]:
        return self.span.tag(self.guard.step_number(self.optimizer))


class AcceleratorGuard:
    """Replaces the `METHODS` of an accelerator.

    Args:
        accelerator: The accelerator, before its `prepare` is called.
        options: Arguments of each new `GuardedOptimizer`.
        records: Destinations of the records.
        fixed: Whether to ignore limits passed to the accelerator.
        model: The model being trained, if known. Default: None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: Mapping[str, Any],
        records: RunRecords,
        *,
        fixed: bool,
        model: nn.Module | None = None,
    ) -> None:
        if accelerator.distributed_type in ENGINES:
            raise engine_error(accelerator.distributed_type.value)
        if isinstance(getattr(accelerator.prepare_optimizer, "__self__", None), AcceleratorGuard):
            raise ValueError("this accelerator is already guarded")
        self.accelerator = accelerator
        self.options: Mapping[str, Any] = options
        self.fixed: bool = fixed
        self.records = records
        self._model = model
        self._passes = _Passes()
        # In the order of `prepare`. The references are weak, since a trainer may replace its
        # optimizers.
        self.prepared: weakref.WeakKeyDictionary[GuardedAcceleratedOptimizer, None]
        self.prepared = weakref.WeakKeyDictionary()
        self._replaced = ReplacedMethods(accelerator, self, METHODS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": list(self.prepared)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepared = weakref.WeakKeyDictionary(dict.fromkeys(state["prepared"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratorGuard:
        return self  # as the accelerator's own deepcopy does

    @property
    def model(self) -> nn.Module | None:
        """The model being trained, if known."""
        return self._model

    def model_of(self, optimizer: Optimizer) -> nn.Module | None:
        """Returns the model that owns a new optimizer's parameters, perhaps a copy of `model`."""
        wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in (self.model, *self.accelerator._models):
            if model is not None and not wanted.isdisjoint(map(id, model.parameters())):
                return model
        return self.model

    def prepare_optimizer(
        self, optimizer: Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Prepares an optimizer like Accelerate's method, guarded."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return self._replaced.original("prepare_optimizer")(optimizer, device_placement)
        model = None if self.model is None else self.model_of(optimizer)
        optimizer = guarded(
            optimizer,
            model,
            self.options,
            world_size=self.accelerator.num_processes,
            replicated=self.accelerator.distributed_type.value.startswith("MULTI_"),
        )
        if device_placement is None:
            device_placement = self.accelerator.device_placement
        prepared = GuardedAcceleratedOptimizer(
            optimizer, device_placement=device_placement, scaler=self.accelerator.scaler
        )
        prepared.guard = self
        prepared.span = BatchSpan()
        prepared.limit = RequestedLimit(optimizer, fixed=self.fixed)
        prepared.statistics = None if model is None else ModelBuffers(model)
        prepared.attach()
        prepared._is_accelerate_prepared = True  # makes Accelerate only register the optimizer
        self.prepared[prepared] = None
        self.open_records()
        return self._replaced.original("prepare_optimizer")(prepared, device_placement)

    def open_records(self) -> None:
        """Opens the records on the main process, and again after `end_training`."""
        optimizers = [prepared.optimizer for prepared in self.prepared]
        self.records.begin(optimizers, writes=self.accelerator.is_main_process)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """Like Accelerate's method, but the guard scales the gradients in the next step."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        wanted = {id(p) for p in parameters if p.grad is not None}
        for prepared in self.prepared:
            groups = prepared.param_groups
            if wanted == {id(p) for g in groups for p in g["params"] if p.grad is not None}:
                self.accelerator.unscale_gradients()
                prepared.limit.request_norm(max_norm, norm_type)
                return self.total_norm(prepared.optimizer, parameters)
        # The parameters do not belong to exactly one optimizer, so no step can clip them.
        return self._replaced.original("clip_grad_norm_")(parameters, max_norm, norm_type)

    def total_norm(self, optimizer: GuardedOptimizer, parameters: list[Tensor]) -> Tensor:
        """Measures the norm that `clip_grad_norm_` returns; reads the gradients once more."""
        grads = [p.grad for p in parameters if p.grad is not None]
        return get_total_norm(grads, optimizer.norm_type, group=optimizer.group)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Like Accelerate's method; also passes the loss to the guard if its optimizer is known."""
        self.count_batch()
        optimizers = [prepared.optimizer for prepared in self.prepared]
        optimizer = optimizer_of_loss(optimizers, loss, self.accelerator.num_processes)
        if optimizer is not None:
            optimizer.observe(self.loss_of_batch(loss.detach()))
        self._replaced.original("backward")(loss, **kwargs)

    def count_batch(self) -> None:
        """Counts a batch. In a custom loop, each call of `backward` counts as one batch."""
        self.begin_batch(*self._passes.next_batch(self.accelerator.gradient_state))

    def begin_batch(self, epoch: int | None, batch: int) -> None:
        """Adds a batch to the next step of each optimizer, before its backward pass."""
        for prepared in self.prepared:
            prepared.span.begin(epoch, batch)
            prepared.span.add(to=prepared)

    def loss_of_batch(self, loss: Tensor) -> Tensor:
        """Returns the loss of a micro-batch.

        It is scaled such that the mean over micro-batches is the loss of the step.
        """
        return loss

    def step_number(self, optimizer: GuardedOptimizer) -> int:
        """Returns the number of the next step, from 1, for its tag."""
        return optimizer.steps_taken + 1

    def get_state_dict(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Like Accelerate's method; flat parameters are copied.

        When Accelerate saves in the safetensors format, it drops tensors that share memory.
        """
        state_dict = self._replaced.original("get_state_dict")(model, *args, **kwargs)
        if self._flat_steps() and isinstance(state_dict, dict):
            give_own_memory(state_dict)
        return state_dict

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        """Like Accelerate's method; safetensors cannot load into parameters that share memory."""
        for stepper in self._flat_steps():
            stepper.release()
        self._replaced.original("load_state")(*args, **kwargs)

    def _flat_steps(self) -> list[FlatStep]:
        steppers = (prepared.optimizer._stepper for prepared in self.prepared)
        return [stepper for stepper in steppers if isinstance(stepper, FlatStep)]

    def end_training(self) -> None:
        """Like Accelerate's method; also writes the last records."""
        self.records.end()
        self._replaced.original("end_training")()


def give_own_memory(state_dict: dict[str, Any]) -> None:
    """Replaces tensors that share memory with others with copies; tied tensors remain tied.

    Example:
        >>> import torch
        >>> a, b = torch.arange(4.0).split(2)
        >>> give_own_memory(tensors := {"a": a, "tied": a, "b": b})
        >>> tensors["b"].untyped_storage().nbytes(), tensors["a"] is tensors["tied"]
        (8, True)
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.nbytes:
            key = value.data_ptr(), value.dtype, value.shape, value.stride()
            if key not in copies:
                copies[key] = value.clone()
            state_dict[name] = copies[key]


class _Passes:
    """Counts passes over the data, from Accelerate's state of its data loaders."""

    def __init__(self) -> None:
        self._pass: tuple[Any, ...] | None = None  # identifies the current pass over the data
        self._epoch: int | None = None
        self._batch = 0

    def next_batch(self, state: Any) -> tuple[int | None, int]:
        """Returns epoch (None without a prepared data loader) and batch, both from 0.

        Args:
            state: The accelerator's `gradient_state`.
        """
        loader = state.active_dataloader
        if loader is None:
            now: tuple[Any, ...] = ()
        else:
            # Accelerate does not count a loop that ended early as an iteration, but keeps its
            # reference.
            references = len(state.dataloader_references)
            now = (id(loader.dataset), id(loader), loader.iteration, references)
        if now == self._pass:
            self._batch += 1
            return self._epoch, self._batch
        same_data = self._pass is not None and self._pass[:1] == now[:1]
        self._pass = now
        self._batch = _skipped_batches(loader)
        if loader is None:
            self._epoch = None
        elif same_data and self._epoch is not None:
            self._epoch = max(self._epoch + 1, loader.iteration)
        else:
            self._epoch = loader.iteration
        return self._epoch, self._batch


def _skipped_batches(loader: Any) -> int:
    """Returns the number of batches that `skip_first_batches` skips."""
    samplers = (getattr(loader, name, None) for name in ("batch_sampler", "sampler"))
    return max(getattr(part, "skip_batches", 0) for part in (loader, *samplers))


def guard(
    accelerator: Accelerator,
    model: nn.Module | None = None,
    *,
    records: str | os.PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    **options: Any,
) -> Accelerator:
    """Guards every optimizer that this accelerator prepares from now on; see docs/huggingface.md.

    Args:
        accelerator: The accelerator, before its `prepare` is called; optimizers prepared earlier
            are not guarded, which logs a warning.
        model: The model being trained, so that records name its parameters and a skipped step
            restores its running statistics. Prepare it before its optimizer, or first in the same
            call. Default: None.
        records: JSON lines file to which the main process appends each record. Default: None.
        sinks: Called with each record on the main process, such as `TensorBoardSink("run")`.
        options: Arguments of `GuardedOptimizer`. If they include `max_norm`, limits passed to
            `accelerator.clip_grad_norm_` are ignored.

    Returns:
        The same accelerator.

    Raises:
        TypeError: `records` is not a path, or a sink is not callable.
        OSError: `records` is a folder.
        ValueError: The accelerator is already guarded, or an engine takes the steps (DeepSpeed,
            Megatron, XLA).
    """
    fixed = "max_norm" in options
    if accelerator._optimizers:
        log.warning(
            "guard was called after accelerator.prepare, so %d optimizers are not guarded; call it "
            "before prepare",
            len(accelerator._optimizers),
        )
    AcceleratorGuard(accelerator, options, RunRecords(records, sinks), fixed=fixed, model=model)
    return accelerator
