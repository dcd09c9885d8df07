"""Detects an optimizer whose `step` computes gradients itself, without a closure.

Such an optimizer holds a model or a closure (GSAM), or takes a loss and calls `backward`. The guard
has measured other gradients than it uses, so it must decide after the step: see `WholeStep`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fastguard.guard.optimizer_copy import OptimizerCopy


class TakenStep(NamedTuple):
    """A step that has already been taken.

    Attributes:
        before: A copy from before the step, to undo it.
        call: The call of the wrapped `step`.
        result: What it returned.
    """

    before: OptimizerCopy
    call: Any
    result: Any


class OwnBackward:
    """Context of one step, in which `backward` may be called.

    Only the first parameter with a gradient is observed; registering its hook takes some 5 µs, so
    `InnerStep` uses this in the first step only.

    Attributes:
        found: Whether gradients were accumulated.
        before: A copy from before any change; None: there is none, since the weights had changed
            when the first gradient was accumulated.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.found: bool = False
        self.before: OptimizerCopy | None = None
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._versions: list[int] = []
        self._handle: Any = None

    def __enter__(self) -> OwnBackward:
        """Registers the hook, and copies an optimizer that could change the weights before it."""
        with suppress(Exception):  # lazy and fake parameters, state that cannot be copied
            trained = [p for p in self._parameters if p.requires_grad and p.is_leaf]
            observed = next((p for p in trained if p.grad is not None), trained[0])
            self._versions = [p._version for p in self._parameters]
            self._handle = observed.register_post_accumulate_grad_hook(self._note)
            if holds_a_model(self._optimizer):
                self.before = OptimizerCopy.of(self._optimizer)
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()

    def _note(self, _: Tensor) -> None:
        if not self.found and self.before is None:
            if [p._version for p in self._parameters] == self._versions:
                with suppress(Exception):  # state that cannot be copied
                    self.before = OptimizerCopy.of(self._optimizer)
        self.found = True


def holds_a_model(optimizer: Optimizer) -> bool:
    """Whether an attribute of an optimizer is a module or a function, other than its `step`."""
    kinds = Module | FunctionType | MethodType | partial
    return any(isinstance(v, kinds) and name != "step" for name, v in vars(optimizer).items())
