"""The ways to skip a step of the wrapped optimizer, chosen by `stepper_for`.

* `OnDevice`: fused optimizers read the device scalar `found_inf` in their kernel, and write nothing
  if the scalar is exactly 1. The host never waits.
* `InUpdate`: the optimizers of `fastguard.optim` apply the whole verdict in their update, so not
  even the gradients are written.
* `ReadFirst`: for all other optimizers, the guard does not call `step`. It needs `found_inf` on the
  host, which is free on a CPU and takes one read of a scalar on a GPU.
* `FlatStep`: with `flat_parameters=True`, `OnDevice` or `ReadFirst` over long runs of parameters.
* `CompiledStep`: with `compile_step=True`, the update is compiled with every write masked by
  `found_inf`.
* `WholeStep`: optimizers that evaluate a closure in the middle of their step, such as LBFGS. The
  step is taken first, and undone if it was bad.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.clip_scope import Limit
from fastguard.guard.compiled_step import CompiledStep
from fastguard.guard.flat_step import FlatStep
from fastguard.guard.found_inf import reads_found_inf
from fastguard.guard.in_update import InUpdate
from fastguard.guard.inner_step import StepCall
from fastguard.guard.on_device import OnDevice
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.read_first import ReadFirst
from fastguard.guard.whole_step import WholeStep
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule


class Stepper(Protocol):
    """Runs the apply stage and then the step of the wrapped optimizer, or skips it."""

    skips: str
    """How a step is skipped without waiting, for `GuardedOptimizer.describe`."""

    @property
    def reads_first(self) -> bool:
        """Whether every step reads the verdict on the host before it applies or skips."""
        ...

    def fits(self) -> bool:
        """Whether this stepper still suits the optimizer, whose settings may change."""
        ...

    def reset(self) -> None:
        """Called when the parameters in the param groups have changed."""
        ...

    def applicable(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """Returns the limits and spike rules that this stepper can apply."""
        ...

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Evaluates the closure, before the decision.

        Args:
            call: The closure and the arguments for the wrapped optimizer.
            loss: The loss that the caller passed; None: the result of the closure.
            stop_at_nonfinite: Whether repeated evaluations end with the first non-finite loss.

        Returns:
            The result of `GuardedOptimizer.step`, used if the wrapped `step` returns None; and the
            loss.
        """
        ...

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Applies a verdict to the gradients, and calls the optimizer unless the step is skipped.

        Args:
            buckets: The gradients that were measured.
            verdict: The verdict.
            call: The arguments for the wrapped optimizer; receives its result.
            changes: Whether gradients may have to be changed.
        """
        ...

    def conclude(self, taken: bool) -> None:
        """Ends a step.

        Args:
            taken: Whether the step counts. If False, weights and state are restored if possible.
        """
        ...


def requested_stepper(
    optimizer: Optimizer, gradients: Gradients, flat_parameters: bool, compile_step: bool
) -> Stepper:
    """Returns the stepper that the class of the optimizer or the arguments of the guard require.

    Returns None if they require no particular stepper; then `stepper_for` chooses one, and may
    choose another one when settings change.
    """
    if flat_parameters:
        return FlatStep(optimizer, gradients)
    if compile_step:
        return CompiledStep(optimizer, gradients)
    if isinstance(optimizer, FusedOptimizer):
        return InUpdate(optimizer, gradients)
    return stepper_for(optimizer)


def stepper_for(optimizer: Optimizer) -> Stepper:
    """Returns the stepper for an optimizer; `OnDevice` only if every param group is fused."""
    if WholeStep.serves(optimizer):
        return WholeStep(optimizer)
    return OnDevice(optimizer) if reads_found_inf(optimizer) else ReadFirst(optimizer)
