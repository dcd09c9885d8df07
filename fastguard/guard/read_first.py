"""`ReadFirst`: reads the verdict before the step, for optimizers that cannot skip by themselves."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.clip_scope import Limit
from fastguard.guard.found_inf import reads_found_inf
from fastguard.guard.inner_step import InnerStep, StepCall
from fastguard.guard.step_hooks import run_global_hooks
from fastguard.stages.apply import apply
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule


def skips_step(verdict: Verdict) -> bool:
    """Whether a verdict skips the step. Waits for a GPU.

    False for placeholders (fake or meta tensors, used to trace or estimate a step): their verdict
    has no value.
    """
    return has_numbers(verdict.found_inf) and verdict.found_inf.item() != 0.0


class ReadFirst:
    """Reads the verdict, then steps or skips; this is free on a CPU, and reads one scalar on a GPU.

    Also the base class of steppers that read the verdict first only in some steps.

    Args:
        optimizer: The wrapped optimizer.
        inner: Calls the optimizer.
    """

    skips: str = "after reading the verdict"

    def __init__(self, optimizer: Optimizer, inner: InnerStep | None = None) -> None:
        self.optimizer = optimizer
        self._inner = inner or InnerStep(optimizer)

    @property
    def reads_first(self) -> bool:
        """Whether every step reads the verdict first."""
        return True

    def fits(self) -> bool:
        """Whether the optimizer still cannot skip by itself."""
        return not reads_found_inf(self.optimizer)

    def reset(self) -> None:
        """Does nothing, since there is no state per parameter."""

    def applicable(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """Returns all limits and rules, since gradients are scaled before the update."""
        return limits, rules

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Evaluates the closure; its result is the loss, unless one was passed."""
        result = self._inner.evaluate(call)
        return result, result if loss is None else loss

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Applies the verdict, and steps unless it says to skip."""
        if changes:
            apply(buckets, verdict)
        if skips_step(verdict):
            run_global_hooks(self.optimizer)
        else:
            self._inner(call)

    def conclude(self, taken: bool) -> None:
        """Does nothing, since there is no copy with which a failed step could be undone."""
