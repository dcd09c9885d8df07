"""`WholeStep`: for optimizers that evaluate a closure in the middle of their step (LBFGS, SAM).

These optimizers, schedule-free ones with a closure, and those that hold their model (GSAM), change
the weights before or between evaluations, so no decision is possible before the step. The guard
lets them step, checks the gradients and the loss of the last evaluation, and restores weights and
state if these are bad. A non-finite loss ends the step immediately, because a line search would
fail with an IndexError on such a loss. Each step copies weights and state once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastguard.errors.logger import log
from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.clip_scope import Limit
from fastguard.guard.inner_step import StepCall
from fastguard.guard.optimizer_copy import OptimizerCopy
from fastguard.guard.own_backward import TakenStep
from fastguard.guard.read_first import skips_step
from fastguard.guard.step_hooks import run_global_post_hooks
from fastguard.records.losses import named_losses
from fastguard.stages.apply import apply
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule


class _NonFiniteLoss(Exception):
    """Raised from the closure to end the optimizer's step."""


class WholeStep:
    """Steps first, decides afterward, and undoes the step if it was bad.

    Args:
        optimizer: The wrapped optimizer.
        taken: Its first step, if it has computed gradients without a closure; it then needs none.
    """

    reads_first = True
    skips = "after reading the verdict"

    def __init__(self, optimizer: Optimizer, taken: TakenStep | None = None) -> None:
        self.optimizer = optimizer
        self._needs_closure = taken is None
        self._taken = taken
        self._before: OptimizerCopy | None = None
        self._warned = False  # whether the warning that limits have no effect was given

    @staticmethod
    def serves(optimizer: Optimizer) -> bool:
        """Whether an optimizer is known to need this stepper, before its first step."""
        return isinstance(optimizer, torch.optim.LBFGS)

    def fits(self) -> bool:
        """Returns True, since an optimizer that evaluates a closure in its step keeps doing so."""
        return True

    def applicable(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """Returns limits and rules that clip nothing, since the gradients have been used.

        Warns once if the given limits or rules would clip.
        """
        adaptive = [limit for limit in limits if not isinstance(limit, float)]
        least = min((limit for limit in limits if isinstance(limit, float)), default=math.inf)
        shown = adaptive[0] if adaptive else least
        clips = [f"max_norm={shown}"] if shown != math.inf else []
        clips += [str(rule) for rule in rules if rule.action == "clip"]
        if clips and not self._warned:
            self._warned = True
            log.warning(
                "%s has no effect: %s evaluates a closure in the middle of its step, so its "
                "gradients cannot be clipped before they are used; clip them in the closure, after "
                "backward()",
                " and ".join(clips),
                type(self.optimizer).__name__,
            )
        recorded = (replace(r, action="record") if r.action == "clip" else r for r in rules)
        return (math.inf,) * len(limits), tuple(recorded)

    def reset(self) -> None:
        """Does nothing, since there is no state between steps."""

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Steps the optimizer, which evaluates the closure.

        Args:
            call: The closure and the other arguments of `step`.
            loss: The loss that the caller passed; None: the loss of the last evaluation.
            stop_at_nonfinite: Whether the first non-finite loss ends the step.

        Returns:
            The result of `step`, or the first loss if a non-finite loss ended the step; and the
            loss, which is the last one in that case.

        Raises:
            TypeError: There is no closure, but the optimizer needs one.
        """
        taken, self._taken = self._taken, None
        if taken is not None:
            if taken.call is call:
                self._before = taken.before
                return taken.result, loss
            taken.before.restore()  # an interrupt has ended its call
        closure = call.closure
        if closure is None and self._needs_closure:
            raise TypeError(
                f"{type(self.optimizer).__name__}.step needs a closure that evaluates the model; "
                "pass step(closure)"
            )
        parameters = chain.from_iterable(g["params"] for g in self.optimizer.param_groups)
        # Lazy parameters get their values in the first evaluation.
        self._before = None if any(map(is_lazy, parameters)) else OptimizerCopy.of(self.optimizer)
        if closure is None:
            return self.optimizer.step(*call.args, **call.kwargs), loss
        losses: list[Any] = []

        def remember(*args: Any, **kwargs: Any) -> Any:
            given = closure(*args, **kwargs)
            if self._before is None:
                self._before = OptimizerCopy.of(self.optimizer)
            losses[1:] = [given]  # only the first and the last loss are kept
            if stop_at_nonfinite and _is_nonfinite(given):
                raise _NonFiniteLoss
            return given

        try:
            args, kwargs = call.with_closure(remember)
            result = self.optimizer.step(*args, **kwargs)
        except _NonFiniteLoss:
            run_global_post_hooks(self.optimizer)
            return losses[0], losses[-1]
        last = losses[-1] if losses else None
        return result, last if loss is None else loss

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Restores weights and state if the verdict skips the step."""
        if changes:  # sets non-finite elements to zero
            apply(buckets, verdict)
        if skips_step(verdict) and self._before is not None:
            self._before.restore()

    def conclude(self, taken: bool) -> None:
        """Restores weights and state bitwise if the step failed before a decision."""
        if self._before is not None and not taken:
            self._before.restore()
        self._before = None


def _is_nonfinite(loss: Any) -> bool:
    values = map(torch.as_tensor, named_losses(loss).values())
    return any(has_numbers(x) and not x.isfinite().all() for x in values)
