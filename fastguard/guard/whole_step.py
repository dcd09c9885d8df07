"""Optimizers that evaluate their closure themselves: LBFGS, SAM, closure forms of schedule-free.

They move the weights between or before evaluations, so there is no moment before the step at which
to decide. The guard lets them step, looks at the gradients and the loss of the last evaluation, and
takes the whole step back, weights and state, if these are bad. A non-finite loss ends the step
there and then: a line search fails on it with an IndexError. Costs one copy of weights and state a
step.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.clip_scope import Limit
from fastguard.guard.inner_step import StepCall
from fastguard.guard.optimizer_copy import OptimizerCopy
from fastguard.guard.read_first import says_skip
from fastguard.guard.step_hooks import run_hooks_of_all
from fastguard.records.losses import named_losses
from fastguard.stages.apply import apply
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule

log: logging.Logger = logging.getLogger("fastguard")


class _NonFiniteLoss(Exception):
    """Leaves the optimizer's step."""


class WholeStep:
    """Steps first, decides afterwards, takes back if it must."""

    waits = True
    skips = "after reading the verdict"

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._before: OptimizerCopy | None = None
        self._told = False  # that it clips nothing

    @staticmethod
    def serves(optimizer: Optimizer) -> bool:
        """Whether an optimizer is known for that. Of others it shows at their first step."""
        return isinstance(optimizer, torch.optim.LBFGS)

    def fits(self) -> bool:
        """An optimizer that evaluates its closure itself always does."""
        return True

    def obeyed(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """Limits and rules that clip nothing: the gradients have been used when they are seen.

        One warning says so where they would clip.
        """
        adaptive = [limit for limit in limits if not isinstance(limit, float)]
        least = min((limit for limit in limits if isinstance(limit, float)), default=math.inf)
        shown = adaptive[0] if adaptive else least
        clips = [f"max_norm={shown}"] if shown != math.inf else []
        clips += [str(rule) for rule in rules if rule.action == "clip"]
        if clips and not self._told:
            self._told = True
            log.warning(
                "%s has no effect: %s evaluates its closure itself, and gradients inside such a "
                "step cannot be clipped; clip them in the closure, after backward()",
                " and ".join(clips),
                type(self.optimizer).__name__,
            )
        recorded = (replace(r, action="record") if r.action == "clip" else r for r in rules)
        return (math.inf,) * len(limits), tuple(recorded)

    def reset(self) -> None:
        """Nothing is remembered of the parameters between steps."""

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Steps the optimizer, which evaluates the closure.

        Args:
            call: The closure and what else `step` takes.
            loss: What the caller gave as the loss; None: that of the last evaluation.
            stop_at_nonfinite: The first non-finite loss is the last evaluation.

        Returns:
            What `step` returned, or the first loss if a non-finite one ended it; and the loss: the
            last one if it ended the step, whatever the caller gave.

        Raises:
            TypeError: There is no closure.
        """
        closure = call.closure
        if closure is None:
            raise TypeError(
                f"{type(self.optimizer).__name__}.step needs a closure that evaluates the model; "
                "pass step(closure)"
            )
        self._before = OptimizerCopy.of(self.optimizer)
        losses: list[Any] = []

        def remember() -> Any:
            given = closure()
            losses[1:] = [given]  # the first and the last
            if stop_at_nonfinite and _is_nonfinite(given):
                raise _NonFiniteLoss
            return given

        try:
            args, kwargs = call.with_closure(remember)
            result = self.optimizer.step(*args, **kwargs)
        except _NonFiniteLoss:
            run_hooks_of_all(self.optimizer, pre=False)
            return losses[0], losses[-1]
        last = losses[-1] if losses else None
        return result, last if loss is None else loss

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Keeps the step, or takes it back."""
        if changes:  # sets what is non-finite to zero
            apply(buckets, verdict)
        if says_skip(verdict) and self._before is not None:
            self._before.restore()

    def conclude(self, taken: bool) -> None:
        """Weights and state as they were before `evaluate`, bit for bit, unless it was decided."""
        if self._before is not None and not taken:
            self._before.restore()
        self._before = None


def _is_nonfinite(loss: Any) -> bool:
    values = map(torch.as_tensor, named_losses(loss).values())
    return any(has_numbers(x) and not x.isfinite().all() for x in values)
