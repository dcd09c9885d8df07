"""`OnDevice`: fused optimizers skip on the device, so the host never waits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.found_inf import reads_found_inf
from fastguard.guard.inner_step import InnerStep, StepCall
from fastguard.guard.read_first import ReadFirst, skips_step
from fastguard.guard.step_hooks import has_step_hooks
from fastguard.stages.apply import apply
from fastguard.stages.contract import Verdict


class OnDevice(ReadFirst):
    """Passes the verdict to the kernel of a fused optimizer, as `found_inf`.

    The kernel tests `found_inf == 1` and expects float32 of shape `()`. `grad_scale` remains None,
    because if it were set, the kernel would write the gradients back even at scale 1.

    The step reads the verdict first in two cases: if the optimizer has step hooks, which must run
    only when it steps; and in the first step of fused SGD with momentum. If the kernel skipped that
    first step, torch would keep an uninitialized momentum buffer, and no value written into the
    buffer would make torch use the formula of the first step again.
    """

    skips = "through found_inf"

    def __init__(self, optimizer: Optimizer, inner: InnerStep | None = None) -> None:
        super().__init__(optimizer, inner)
        self.reset()

    def fits(self) -> bool:
        """Whether the kernels of the optimizer still read `found_inf`, in every param group."""
        return reads_found_inf(self.optimizer)

    def reset(self) -> None:
        """Forgets which parameters have a momentum buffer."""
        self._complete: tuple[int, int] | None = None
        self._complete_in: object = None  # the optimizer state that holds all buffers

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Applies the verdict to the gradients, and steps with `found_inf` set."""
        if self.reads_first or self._creates_momentum():
            super().step(buckets, verdict, call, changes)
            return
        if changes:
            apply(buckets, verdict)
        optimizer = self.optimizer
        try:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = verdict.found_inf  # type: ignore[attr-defined]
            self._inner(call)
        except (TypeError, LookupError):
            # State of a parameter was removed by hand. Torch raises before its kernel runs, but a
            # bad step must be skipped like any other.
            if not skips_step(verdict):
                raise
        finally:
            self._forget_verdict()

    @property
    def reads_first(self) -> bool:
        """Whether every step reads the verdict first, because the optimizer has step hooks."""
        return has_step_hooks(self.optimizer)

    def conclude(self, taken: bool) -> None:
        """Removes the verdict from the optimizer, where it remains after an interrupt."""
        self._forget_verdict()

    def _forget_verdict(self) -> None:
        self.optimizer.__dict__.pop("grad_scale", None)
        self.optimizer.__dict__.pop("found_inf", None)

    def _creates_momentum(self) -> bool:
        """Whether this step would create a momentum buffer.

        Checks all parameters until each one has a buffer, and again after groups or state have
        changed.
        """
        if not isinstance(self.optimizer, torch.optim.SGD):
            return False
        state = self.optimizer.state
        groups = [g["params"] for g in self.optimizer.param_groups if g["momentum"] != 0]
        seen = (len(state), sum(map(len, groups)))
        known = seen == self._complete and state is self._complete_in
        if known and all(_has_buffer(state, _first_with_grad(g)) for g in groups if g):
            return False
        complete = True
        for p in chain.from_iterable(groups):
            if not _has_buffer(state, p):
                if p.grad is not None:
                    return True
                complete = False
        self._complete, self._complete_in = (seen, state) if complete else (None, None)
        return False


def _first_with_grad(parameters: list[Tensor]) -> Tensor:
    """Returns the parameter whose missing buffer tells torch that this is the first step."""
    return next((p for p in parameters if p.grad is not None), parameters[0])


def _has_buffer(state: Mapping[Tensor, Mapping[str, Any]], p: Tensor) -> bool:
    return state.get(p, {}).get("momentum_buffer") is not None
