"""`InUpdate`: the optimizers of `fastguard.optim` apply the verdict within their update.

The update clips, unscales and cleans the gradients as it reads them; `.grad` is not changed. The
update also applies the limits of units, see `unit_clipping`. On a CPU the step reads the verdict
first, which costs nothing; on other devices the update itself skips.
"""

from __future__ import annotations

from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.inner_step import StepCall
from fastguard.guard.param_gradients import Gradients
from fastguard.guard.read_first import ReadFirst, skips_step
from fastguard.guard.step_hooks import has_step_hooks, run_global_hooks
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.optim.orders import Orders
from fastguard.stages.contract import Verdict


class InUpdate(ReadFirst):
    """Passes the verdict to an optimizer of `fastguard.optim`.

    If the optimizer has step hooks, which must run only when it steps, the verdict is read first.

    Args:
        optimizer: The wrapped optimizer.
        gradients: The gradients of the optimizer.
    """

    optimizer: FusedOptimizer
    skips = "in the update"

    def __init__(self, optimizer: FusedOptimizer, gradients: Gradients) -> None:
        super().__init__(optimizer)
        self._gradients = gradients

    @property
    def reads_first(self) -> bool:
        """Whether every step reads the verdict first: on a CPU, or if the optimizer has hooks."""
        return has_step_hooks(self.optimizer) or self._on_host()

    def fits(self) -> bool:
        """Returns True, since the class of the optimizer does not change."""
        return True

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Calls the optimizer with the verdict."""
        if self.reads_first and skips_step(verdict):
            run_global_hooks(self.optimizer)
            return
        with self.optimizer.obeying(self._orders(verdict)):
            self._inner(call)

    def _orders(self, verdict: Verdict) -> Orders:
        # Takes the segments from the layout, because flat buckets omit parameters without a slot.
        segments = self._gradients.layout.segments if verdict.multiplier.numel() > 1 else None
        return Orders(verdict.multiplier, verdict.found_inf, verdict.clean, segments, verdict.units)

    def _on_host(self) -> bool:
        groups = self.optimizer.param_groups
        return all(p.device.type == "cpu" for group in groups for p in group["params"][:1])
