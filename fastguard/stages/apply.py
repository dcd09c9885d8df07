"""Stage 4, apply: scales and cleans the gradients in place, as the verdict says.

    g <- multiplier[segment of g] * (0 if the verdict cleans and g is not finite, else g)

I/O: none if there is nothing to do; otherwise reads and writes the gradients of the affected
segments (2N bytes).
"""

from __future__ import annotations

from torch import Tensor

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import UNSUPPORTED_ERRORS, refuse_wrapped
from fastguard.gradients.transfer import moved
from fastguard.stages import backend
from fastguard.stages.contract import HostVerdict, Verdict


def apply(buckets: GradBuckets, verdict: Verdict) -> None:
    """Applies a verdict to the gradients, in place.

    Args:
        buckets: The gradients that were measured.
        verdict: The verdict; segments with a `multiplier` of 1 are not scaled.
    """
    if isinstance(verdict, HostVerdict) and not verdict.known.changes_gradients:
        return
    scale(buckets, verdict.multiplier, verdict.clean, verdict.changes)


def scale(
    buckets: GradBuckets, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
) -> None:
    """Scales and cleans the gradients in place.

    Args:
        buckets: The gradients.
        multiplier: float64 `(S,)` or `(1,)`; 1 leaves a segment bitwise unchanged.
        clean: `()`; nonzero: non-finite elements are set to 0.
        changes: float32 `()`; 0: nothing to do in any segment; None: not known.
    """
    n, given = buckets.n_measured, multiplier.numel()
    if given != n:  # (1,) applies to all segments, (S,) to all weight classes of each segment
        multiplier = multiplier.expand(n) if given == 1 else multiplier.repeat(n // given)
    for bucket in buckets.buckets:
        there, clean_there = moved(multiplier, bucket.device), moved(clean, bucket.device)
        changes_there = None if changes is None else moved(changes, bucket.device)
        try:
            stages = backend.stages(bucket.device, bucket.kind)
            stages.apply(bucket, there, clean_there, changes_there)
        except UNSUPPORTED_ERRORS as error:
            refuse_wrapped(bucket.grads, error)
            raise
        bucket.write_back()
