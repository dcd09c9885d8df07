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

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastguard.functional.clip import get_total_norm
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.model_buffers import ModelBuffers
from fastguard.integrations.replaced import TakenOver
from fastguard.integrations.requested_limit import AskedLimit, was_skipped
from fastguard.integrations.shared import (
    BatchSpan,
    RunRecords,
    Sink,
    StepTags,
    alone_in_training,
    engine_error,
    guarded,
    needs,
)

with needs("huggingface"):
    from accelerate import Accelerator, DistributedType
    from accelerate.optimizer import AcceleratedOptimizer

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
METHODS = ("prepare_optimizer", "clip_grad_norm_", "backward", "end_training")


class GuardedAcceleratedOptimizer(AcceleratedOptimizer):
    """Accelerate's wrapper around a guarded optimizer."""

    limit: AskedLimit
    statistics: ModelBuffers | None
    guard: AcceleratorGuard

    @property
    def step_was_skipped(self) -> bool:
        """Whether the guard skipped the last step, for the scaler too. Waits for a GPU."""
        return was_skipped(self.optimizer)

    def attach(self) -> None:
        """Hooks what goes with a step into the optimizer; copies of an optimizer have no hooks."""
        if self.statistics is not None:
            self.statistics.follow(self.optimizer)
        StepTags(self.optimizer, self._tag, self._clear)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a `step` on the instance that holds it: a copy would step the original.
        return {name: v for name, v in super().__getstate__().items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.attach()

    def _tag(self) -> dict[str, Any]:
        return self.guard.tag(self.optimizer)

    def _clear(self) -> None:
        self.guard.span.clear()


class AcceleratorGuard:
    """Stands in for `prepare_optimizer`, `clip_grad_norm_`, `backward` and `end_training` of one
    accelerator.

    Args:
        accelerator: Before its `prepare` is called.
        options: The arguments of each new `GuardedOptimizer`.
        records: Where the records of the run go.
        fixed: Limits that the accelerator is asked for are ignored.
        model: What is trained, if it is known.
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
            raise ValueError("this accelerator is guarded already")
        self.accelerator, self.options, self.fixed = accelerator, options, fixed
        self.records = records
        self.span = BatchSpan()
        self._model = model
        self._passes = _Passes()
        # In the order of `prepare`; weak, because a trainer makes new ones and drops the old.
        self.prepared: weakref.WeakKeyDictionary[GuardedAcceleratedOptimizer, None]
        self.prepared = weakref.WeakKeyDictionary()
        self._accelerates = TakenOver(accelerator, self, METHODS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": list(self.prepared)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepared = weakref.WeakKeyDictionary(dict.fromkeys(state["prepared"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratorGuard:
        return self  # as the accelerator does

    @property
    def model(self) -> nn.Module | None:
        """What is trained, if it is known."""
        return self._model

    def model_of(self, optimizer: Optimizer) -> nn.Module | None:
        """The model whose parameters a new optimizer has; a copy of one may have come since."""
        wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in (self.model, *self.accelerator._models):
            if model is not None and not wanted.isdisjoint(map(id, model.parameters())):
                return model
        return self.model

    def prepare_optimizer(
        self, optimizer: Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """As Accelerate's own."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return self._accelerates.own("prepare_optimizer")(optimizer, device_placement)
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
        prepared.limit = AskedLimit(optimizer, fixed=self.fixed)
        prepared.statistics = None if model is None else ModelBuffers(model)
        prepared.attach()
        prepared._is_accelerate_prepared = True  # so that Accelerate only enters it in its books
        self.prepared[prepared] = None
        self.open_records()
        return self._accelerates.own("prepare_optimizer")(prepared, device_placement)

    def open_records(self) -> None:
        """On the main process; again after `end_training`."""
        optimizers = [prepared.optimizer for prepared in self.prepared]
        self.records.begin(optimizers, writes=self.accelerator.is_main_process)

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
        return self._accelerates.own("clip_grad_norm_")(parameters, max_norm, norm_type)

    def total_norm(self, optimizer: GuardedOptimizer, parameters: list[Tensor]) -> Tensor:
        """The norm that `clip_grad_norm_` returns, measured now: one more read of gradients."""
        grads = [p.grad for p in parameters if p.grad is not None]
        return get_total_norm(grads, optimizer.norm_type, group=optimizer.group)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """As Accelerate's own; the guard sees the loss, if it is clear whose it is."""
        self.count_batch()
        optimizers = [prepared.optimizer for prepared in self.prepared]
        optimizer = alone_in_training(optimizers, loss, self.accelerator.num_processes)
        if optimizer is not None:
            optimizer.observe(self.loss_of_batch(loss.detach()))
        self._accelerates.own("backward")(loss, **kwargs)

    def count_batch(self) -> None:
        """In a loop of the user's own, each call of `backward` is taken for a batch."""
        self.span.begin(*self._passes.next_batch(self.accelerator.gradient_state))
        self.span.add()

    def loss_of_batch(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch, whose mean over the micro-batches is that of the step."""
        return loss

    def tag(self, optimizer: GuardedOptimizer) -> dict[str, Any]:
        """Where in the data the coming step is."""
        return self.span.tag(optimizer.steps_taken + 1)

    def end_training(self) -> None:
        """As Accelerate's own; the last records are written, too."""
        self.records.end()
        self._accelerates.own("end_training")()


class _Passes:
    """Passes of a loop over its data, told apart by what Accelerate knows of its data loaders."""

    def __init__(self) -> None:
        self._pass: tuple[Any, ...] | None = None  # what differs from one pass to the next
        self._epoch: int | None = None
        self._batch = 0

    def next_batch(self, state: Any) -> tuple[int | None, int]:
        """Epoch, None without a prepared data loader, and batch; both from 0.

        Args:
            state: The accelerator's `gradient_state`.
        """
        loader = state.active_dataloader
        if loader is None:
            now: tuple[Any, ...] = ()
        else:
            # A loop that is left early does not count as an iteration, but stays referenced.
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
    """What `skip_first_batches` has left out, itself or by the sampler of the loader."""
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
    """Guards every optimizer that this accelerator prepares from now on; docs/huggingface.md.

    Args:
        accelerator: Before its `prepare` is called.
        model: What is trained, so that records name its parameters and its running statistics
            survive a skipped step; to be prepared before its optimizer, or with it and first.
        records: File of JSON lines that the main process appends each record to.
        sinks: Called with each record on the main process, such as `TensorBoardSink("run")`.
        options: As for `GuardedOptimizer`. With a `max_norm` here, the limits that
            `accelerator.clip_grad_norm_` is called with are ignored.

    Raises:
        TypeError: `records` is no path, or a sink cannot be called.
        OSError: `records` is a folder.
        ValueError: It is guarded already, or an engine steps by itself (DeepSpeed, Megatron, XLA).
    """
    fixed = "max_norm" in options
    AcceleratorGuard(accelerator, options, RunRecords(records, sinks), fixed=fixed, model=model)
    return accelerator
