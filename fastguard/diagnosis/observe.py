"""`observe`: runs the forward and backward pass of one step, and records what they compute.

If a stage fails, the results of earlier stages are kept. Without a loss, the backward pass starts
at the model's output. If the model raises an error, only the activations before the failing module
are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_map

from fastguard.diagnosis.gradients import gradients_of
from fastguard.diagnosis.replay.calls import floats
from fastguard.diagnosis.replay.losses import loss_parts, total_of
from fastguard.diagnosis.replay.replay import copied
from fastguard.diagnosis.replay.subject import Subject, is_readable
from fastguard.diagnosis.replay.tensor_range import as_real
from fastguard.diagnosis.watch_functions import (
    FLOAT16_MAX,
    FunctionWatch,
    IndexOutOfRange,
    NoProbability,
)

FLOAT16_ROUNDS_TO_ZERO = 2.0**-25  # half of the smallest subnormal

Stage = Literal["forward", "loss", "backward"]


@dataclass(frozen=True, slots=True)
class Values:
    """Statistics on the magnitudes in one tensor.

    Attributes:
        numel: Number of elements.
        nonfinite: Number of elements that are NaN, +Inf or -Inf.
        nan: Number of elements that are NaN.
        largest: Magnitude of the largest finite element.
        rms: Root mean square of the finite elements.
        zeros: Number of elements that are exactly 0.
        over: Number of finite elements that overflow in float16.
        under: Number of nonzero elements that round to 0 in float16.
    """

    numel: int
    nonfinite: int
    nan: int
    largest: float
    rms: float
    zeros: int
    over: int
    under: int

    @staticmethod
    @torch.no_grad()
    def of(tensor: Tensor) -> Values:
        """Computes the statistics in a few passes over the tensor; synchronizes with the GPU."""
        x = as_real(tensor).detach()
        size = x.abs()
        finite = size.isfinite()
        n_finite = int(finite.sum())
        if n_finite < x.numel():
            size = torch.where(finite, size, torch.zeros((), dtype=x.dtype, device=x.device))
        largest = float(size.max()) if x.numel() else 0.0
        scaled = (size.double() / largest).square().sum() if largest else torch.zeros(())
        zeros = int((x == 0).sum())
        return Values(
            numel=x.numel(),
            nonfinite=x.numel() - n_finite,
            nan=int(x.isnan().sum()) if n_finite < x.numel() else 0,
            largest=largest,
            rms=largest * float(scaled / max(n_finite, 1)) ** 0.5,
            zeros=zeros,
            over=int((size > FLOAT16_MAX).sum()) if largest > FLOAT16_MAX else 0,
            under=int((size <= FLOAT16_ROUNDS_TO_ZERO).sum()) - zeros - (x.numel() - n_finite),
        )


@dataclass(frozen=True, slots=True)
class Activation:
    """One output tensor of one module call."""

    where: str
    values: Values


@dataclass(frozen=True, slots=True)
class Failure:
    """The error that ended a stage.

    Attributes:
        stage: The stage.
        where: The innermost running module, if any.
        function: The torch function that raised, if any.
        error: The exception.
    """

    stage: Stage
    where: str
    function: str | None
    error: Exception

    @property
    def has_own_finding(self) -> bool:
        """Whether another finding describes the arguments that caused this error."""
        return isinstance(self.error, IndexOutOfRange | NoProbability)

    def __str__(self) -> str:
        first_line = next(iter(str(self.error).splitlines()), "")
        return f"{type(self.error).__name__}: {first_line}"


@dataclass(slots=True)
class Observation:
    """One observed step.

    Attributes:
        functions: Observations on the torch functions called in the step.
        activations: In the order in which module calls returned, inner modules before outer ones.
        called: Names of the modules in the order in which they were entered.
        failures: Errors, at most one per stage.
        output: The model's output, detached; None if the model returned None, raised, or was called
            only through its submodules.
        result: The return value of the step, detached.
        parts: The parts of the loss; empty if there is no loss.
        gradients: Dense gradients by parameter name; None for a parameter that the backward pass
            did not reach. None instead of a dict if there was no backward pass.
        from_output: Whether the backward pass started at the output because there was no loss.
    """

    functions: FunctionWatch
    activations: list[Activation] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    output: Any = None
    result: Any = None
    parts: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] | None = None
    from_output: bool = False

    def failed(self, stage: Stage) -> Failure | None:
        """Returns the failure of this stage, if any."""
        return next((f for f in self.failures if f.stage == stage), None)

    @property
    def has_loss(self) -> bool:
        """Whether the step returned something usable as a loss."""
        return total_of(self.result) is not None and not self.failures


def observe(subject: Subject, batch: Any = None, *, backward: bool = True) -> Observation:
    """Runs one step on a copy of the batch; records errors in the model or the loss.

    Args:
        subject: The model and its step. Parameters, buffers and generators are not restored.
        batch: Replaces the subject's own batch. Default: None.
        backward: Whether to run the backward pass. Default: True.
    """
    batch = copied(subject.batch if batch is None else batch)
    watch = _Watch(subject, batch)
    seen = watch.seen
    result: Any = None
    try:
        with subject.autocast, watch, watch.functions:
            result = subject.step(subject.model, batch)
    except Exception as error:
        stage: Stage = "loss" if watch.output is not None else "forward"
        seen.failures.append(Failure(stage, watch.failed_in, watch.functions.raised, error))
    seen.result = _detached(result)
    seen.output = _detached(watch.output)
    seen.parts = {name: float(part) for name, part in loss_parts(seen.result).items()}
    if backward:
        _go_backward(subject, seen, result, watch.output)
    watch.functions.forget()
    return seen


def _go_backward(subject: Subject, seen: Observation, result: Any, output: Any) -> None:
    total = total_of(result)
    if total is None:
        from_output = [t.double().mean() for t in floats(output) if t.requires_grad]
        if not from_output:
            return
        total, seen.from_output = torch.stack(from_output).sum(), True
    trainable = {name: p for name, p in subject.parameters.items() if p.requires_grad}
    if not total.requires_grad or not trainable:
        return
    try:
        gradients = gradients_of(total, list(trainable.values()))
    except Exception as error:
        seen.failures.append(Failure("backward", "", None, error))
        return
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    seen.gradients = dict(zip(trainable, dense, strict=True))


def _detached(tree: Any) -> Any:
    def detach(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return tree_map(detach, tree) if _is_tree(tree) else tree


def _is_tree(tree: Any) -> bool:
    return isinstance(tree, Tensor | Mapping | list | tuple)


class _Watch:
    """Global module hooks for one step; no module is modified."""

    def __init__(self, subject: Subject, batch: Any) -> None:
        self._model = subject.model
        self._names = subject.modules
        self._running: list[str] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if isinstance(batch, Mapping) and set(batch) == {"inputs", "targets"}:
            targets = batch["targets"]
        self.functions = FunctionWatch(self._innermost_of_model, targets)
        self.seen = Observation(self.functions)
        self.output: Any = None
        self.failed_in = ""

    def _innermost_of_model(self) -> str:
        return self._running[-1] if self._running and self.output is None else ""

    def __enter__(self) -> _Watch:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module, type(module).__name__)
        self._running.append(name)
        self.seen.called.append(name)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._running.pop()
        if sys.exception() is not None and output is None:
            self.failed_in = self.failed_in or name
            return
        with _unseen():
            for tensor in filter(is_readable, floats(output)):
                self.seen.activations.append(Activation(name, Values.of(tensor)))
        if module is self._model:
            self.output = output
            self.functions.mark_output(output)


@contextmanager
def _unseen() -> Iterator[None]:
    """Disables `FunctionWatch` and autocast, so that reading an activation is not observed."""
    with (
        torch._C.DisableTorchFunction(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
