"""Stage 4, apply: what the verdict says is done to the gradients, in place.

    g <- multiplier[segment of g] * (g if finite else 0 if the verdict cleans)

I/O: nothing at all when there is nothing to do; otherwise reads and writes the gradients of the
segments concerned (2N bytes).
"""

from __future__ import annotations

from torch import Tensor

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import LACKING, refuse_wrapped
from fastguard.gradients.transfer import moved
from fastguard.stages import backend
from fastguard.stages.contract import HostVerdict, Verdict


def apply(buckets: GradBuckets, verdict: Verdict) -> None:
    """Scales and cleans the gradients in place, as decided.

    Args:
        buckets: The gradients that were measured.
        verdict: Its `multiplier` is 1 where nothing is to be scaled.
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
        multiplier: float64 `(S,)` or `(1,)`; 1 leaves a segment untouched bit for bit.
        clean: `()`; nonzero sets non-finite elements to 0.
        changes: float32 `()`; 0: there is nothing to do in any segment. None: not known.
    """
    n, given = buckets.n_measured, multiplier.numel()
    if given != n:  # (1,) for all, or (S,) for every class of a segment
        multiplier = multiplier.expand(n) if given == 1 else multiplier.repeat(n // given)
    for bucket in buckets.buckets:
        there, clean_there = moved(multiplier, bucket.device), moved(clean, bucket.device)
        changes_there = None if changes is None else moved(changes, bucket.device)
        try:
            stages = backend.stages(bucket.device, bucket.kind)
            stages.apply(bucket, there, clean_there, changes_there)
        except LACKING as error:
            refuse_wrapped(bucket.grads, error)
            raise
        bucket.write_back()
