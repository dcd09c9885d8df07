"""Reading the verdict before the step: the road of every optimizer that cannot skip by itself."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.clip_scope import Limit
from fastguard.guard.inner_step import InnerStep, StepCall, found_inf_is_heeded
from fastguard.guard.step_hooks import run_hooks_of_all
from fastguard.stages.apply import apply
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule


def says_skip(verdict: Verdict) -> bool:
    """Whether the step is to be skipped. Waits for a GPU.

    No verdict about placeholders is known: they are there to see what a step takes.
    """
    return has_numbers(verdict.found_inf) and verdict.found_inf.item() != 0.0


class ReadFirst:
    """Reads the verdict, then steps or does not: free on a CPU, one read of one scalar on a GPU.

    A verdict about placeholders cannot be read, so the step is taken.
    """

    waits = True
    skips = "after reading the verdict"

    def __init__(self, optimizer: Optimizer, inner: InnerStep | None = None) -> None:
        self.optimizer = optimizer
        self._inner = inner or InnerStep(optimizer)

    def fits(self) -> bool:
        """Whether the optimizer cannot do without this road."""
        return not found_inf_is_heeded(self.optimizer)

    def reset(self) -> None:
        """Nothing is remembered of the parameters."""

    def obeyed(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """All limits and rules: the gradients are scaled before they are used."""
        return limits, rules

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """What the closure returns; it is the loss too unless one is given."""
        result = self._inner.evaluate(call)
        return result, result if loss is None else loss

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Applies the verdict, and steps unless it says to skip."""
        if changes:
            apply(buckets, verdict)
        if says_skip(verdict):
            run_hooks_of_all(self.optimizer)
        else:
            self._inner(call)

    def conclude(self, taken: bool) -> None:
        """Nothing to do: weights that a failed step has begun to move have no copy."""


class ReadsFirstIfNeeded:
    """What the roads share that read the verdict in some steps only.

    Args:
        optimizer: The wrapped one.
        inner: How it is called.
    """

    def __init__(self, optimizer: Optimizer, inner: InnerStep | None = None) -> None:
        self.optimizer = optimizer
        self._inner = inner or InnerStep(optimizer)
        self._careful = ReadFirst(optimizer, self._inner)

    def obeyed(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """See `ReadFirst.obeyed`."""
        return self._careful.obeyed(limits, rules)

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """See `ReadFirst.evaluate`."""
        return self._careful.evaluate(call, loss, stop_at_nonfinite=stop_at_nonfinite)
