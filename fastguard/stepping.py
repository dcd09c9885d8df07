"""How the wrapped optimizer is made to obey: the roads to "this step does not happen".

* `FoundInf`: fused optimizers read the device scalar `found_inf` inside their kernel and write
  nothing when it is exactly 1. Nobody waits.
* `ReadFirst`: every other optimizer is simply not called. That takes the value of `found_inf` on
  the host: free on a CPU, one read of one scalar on a GPU.
* `WholeStep`: LBFGS, which evaluates its closure within the step: see `whole_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.decide import Verdict
from fastguard.whole_step import WholeStep


class ReadFirst:
    """Reads the verdict, then steps or does not. Waits for a GPU."""

    waits = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, verdict: Verdict) -> None:
        if verdict.found_inf.item() == 0.0:
            self.optimizer.step()


class FoundInf:
    """Hands the verdict to the kernel of a fused optimizer.

    The kernel tests `found_inf == 1` exactly and wants float32 of shape `()`; `grad_scale` stays
    None, because with it the kernel writes the gradients back even at scale 1.

    Two exceptions read the verdict first. Fused SGD with momentum, for one step: its first one
    leaves the momentum buffer uninitialised if skipped, and no value there would mean "first step"
    to torch. And an optimizer with step hooks of its own: they must run only when it steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._careful = ReadFirst(optimizer)
        self._complete: tuple[int, int, int] | None = None  # when each parameter had its buffer

    def step(self, verdict: Verdict) -> None:
        if self.waits or self._creates_momentum():
            self._careful.step(verdict)
            return
        optimizer = self.optimizer
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = verdict.found_inf  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    @property
    def waits(self) -> bool:
        """Whether every step reads the verdict: the optimizer has step hooks of its own."""
        hooks = (
            self.optimizer._optimizer_step_pre_hooks,
            self.optimizer._optimizer_step_post_hooks,
        )
        return any(hooks)

    def _creates_momentum(self) -> bool:
        """Whether a parameter would get its momentum buffer now. Looks at all of them until each
        has one, and then again only if the optimizer's groups or its state are others.
        """
        if not isinstance(self.optimizer, torch.optim.SGD):
            return False
        state = self.optimizer.state
        groups = [g["params"] for g in self.optimizer.param_groups if g["momentum"] != 0]
        seen = (id(state), len(state), sum(map(len, groups)))
        if seen == self._complete and all(_has_buffer(state, g[0]) for g in groups if g):
            return False
        complete = True
        for p in chain.from_iterable(groups):
            if not _has_buffer(state, p):
                if p.grad is not None:
                    return True
                complete = False
        self._complete = seen if complete else None
        return False


def _has_buffer(state: Mapping[Tensor, Mapping[str, Any]], p: Tensor) -> bool:
    return state.get(p, {}).get("momentum_buffer") is not None


def road_of(optimizer: Optimizer) -> FoundInf | ReadFirst | WholeStep:
    """The road that an optimizer can take; `FoundInf` only if every param group is fused."""
    if WholeStep.serves(optimizer):
        return WholeStep(optimizer)
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if fused and getattr(optimizer, "_step_supports_amp_scaling", False):
        return FoundInf(optimizer)
    return ReadFirst(optimizer)
