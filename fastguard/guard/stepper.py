"""How the wrapped optimizer is made to obey a verdict: the roads to "this step does not happen".

* `OnDevice`: fused optimizers read the device scalar `found_inf` inside their kernel and write
  nothing when it is exactly 1. Nobody waits.
* `InUpdate`: the optimizers of `fastguard.optim` take the whole verdict into their update, so that
  gradients are not written either.
* `ReadFirst`: every other optimizer is simply not called. That takes the value of `found_inf` on
  the host: free on a CPU, one read of one scalar on a GPU.
* `FlatStep`: with `flat_parameters=True`, either of these two over whole runs of parameters.
* `CompiledStep`: with `compile_step=True`, the update is compiled with every write masked by
  `found_inf`.
* `WholeStep`: optimizers that evaluate their closure themselves, such as LBFGS.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch.optim import Optimizer

from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.clip_scope import Limit
from fastguard.guard.compiled_step import CompiledStep
from fastguard.guard.flat_step import FlatStep
from fastguard.guard.in_update import InUpdate
from fastguard.guard.inner_step import StepCall, found_inf_is_heeded
from fastguard.guard.on_device import OnDevice
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.read_first import ReadFirst
from fastguard.guard.whole_step import WholeStep
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.stages.contract import Verdict
from fastguard.stages.spike_rules import Rule


class Stepper(Protocol):
    """The last of the four stages, apply, and the step of the wrapped optimizer behind it."""

    skips: str
    """How a step is skipped where it does not wait, for `GuardedOptimizer.describe`."""

    @property
    def waits(self) -> bool:
        """Whether every step waits for the verdict to reach the host."""
        ...

    def fits(self) -> bool:
        """Whether this is still the road for the optimizer, whose settings may change."""
        ...

    def reset(self) -> None:
        """The param groups hold other parameters than before."""
        ...

    def obeyed(
        self, limits: tuple[Limit, ...], rules: tuple[Rule, ...]
    ) -> tuple[tuple[Limit, ...], tuple[Rule, ...]]:
        """Of the limits of the norm and the spike rules, those that this road can obey."""
        ...

    def evaluate(self, call: StepCall, loss: Any, *, stop_at_nonfinite: bool) -> tuple[Any, Any]:
        """Evaluates the closure, ahead of the decision.

        Args:
            call: The closure and the arguments for the wrapped optimizer.
            loss: What the caller gave as the loss; None: what the closure returns.
            stop_at_nonfinite: Of several evaluations, the first with a non-finite loss is the last.

        Returns:
            What `GuardedOptimizer.step` returns if the wrapped one gives nothing, and the loss.
        """
        ...

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Applies a verdict to the gradients and has the optimizer step, or not.

        Args:
            buckets: The gradients that were measured.
            verdict: What was decided.
            call: The arguments for the wrapped optimizer; takes what it returns.
            changes: Whether there can be anything to change in the gradients.
        """
        ...

    def conclude(self, taken: bool) -> None:
        """The end of a step.

        Args:
            taken: Whether it counts. If not, weights and state are put back where they can be.
        """
        ...


def stepper_asked_for(
    optimizer: Optimizer, gradients: Gradients, flat_parameters: bool, compile_step: bool
) -> Stepper:
    """The road that the arguments of a guard ask for; without any, `stepper_for`."""
    if flat_parameters:
        return FlatStep(optimizer, gradients)
    return CompiledStep(optimizer, gradients) if compile_step else stepper_for(optimizer)


def stepper_for(optimizer: Optimizer) -> Stepper:
    """The road that an optimizer can take; `OnDevice` only if every param group is fused."""
    if WholeStep.serves(optimizer):
        return WholeStep(optimizer)
    if isinstance(optimizer, FusedOptimizer):
        return InUpdate(optimizer)
    return OnDevice(optimizer) if found_inf_is_heeded(optimizer) else ReadFirst(optimizer)
