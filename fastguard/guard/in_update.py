"""The road of `fastguard.optim`: the verdict goes into the update, and gradients stay as they are.

Neither clipping nor unscaling nor cleaning touches `.grad`: the update multiplies and cleans what
it reads. On a CPU the verdict is read first, which is free; elsewhere the update itself skips.
"""

from __future__ import annotations

from fastguard.gradients.buckets import GradBuckets
from fastguard.guard.inner_step import StepCall
from fastguard.guard.read_first import ReadsFirstIfNeeded, says_skip
from fastguard.guard.step_hooks import has_step_hooks, run_hooks_of_all
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.optim.orders import Orders
from fastguard.stages.contract import Verdict


class InUpdate(ReadsFirstIfNeeded):
    """Hands the verdict to an optimizer of `fastguard.optim`.

    With step hooks of its own, which must run only when it steps, the verdict is read first.
    """

    optimizer: FusedOptimizer
    skips = "in the update"

    def __init__(self, optimizer: FusedOptimizer) -> None:
        super().__init__(optimizer)

    @property
    def waits(self) -> bool:
        """Whether every step reads the verdict: on a CPU, and for step hooks of the optimizer."""
        return has_step_hooks(self.optimizer) or self._on_host()

    def fits(self) -> bool:
        """Always: what kind the optimizer is does not change."""
        return True

    def reset(self) -> None:
        """Nothing is remembered of the parameters."""

    def step(self, buckets: GradBuckets, verdict: Verdict, call: StepCall, changes: bool) -> None:
        """Steps with the verdict as its orders."""
        if self.waits and says_skip(verdict):
            run_hooks_of_all(self.optimizer)
            return
        with self.optimizer.obeying(_orders(buckets, verdict)):
            self._inner(call)

    def conclude(self, taken: bool) -> None:
        """Weights that a failed step has begun to move have no copy."""

    def _on_host(self) -> bool:
        groups = self.optimizer.param_groups
        return all(p.device.type == "cpu" for group in groups for p in group["params"][:1])


def _orders(buckets: GradBuckets, verdict: Verdict) -> Orders:
    n = verdict.multiplier.numel()
    segments = None
    if n > 1:
        segments = [0] * buckets.n_tensors
        for bucket in buckets.buckets:
            for tensor, segment in zip(bucket.tensor_ids, bucket.segment_ids, strict=True):
                segments[tensor] = segment % n
    return Orders(verdict.multiplier, verdict.found_inf, verdict.clean, segments)
