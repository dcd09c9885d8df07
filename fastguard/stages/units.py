"""The adaptive gradient clipping stage: one coefficient per unit (row) of each parameter.

    unit_buckets -> clip_units

I/O: reads gradients and weights once (2N bytes) and writes 8 bytes per unit; then reads and writes
the gradients of the clipped units. With `GuardedOptimizer`, this is the second pass over the
gradients: the first pass measures them to decide whether to take the step. The optimizers of
`fastguard.optim` do not need this stage, since their update clips units itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import UNSUPPORTED_ERRORS, refuse_wrapped
from fastguard.gradients.transfer import moved
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages import backend
from fastguard.stages.agc import UnitSummary
from fastguard.stages.contract import HostVerdict, Verdict


def clip_units(
    units: Sequence[UnitBucket],
    limits: Tensor,
    norm_type: float,
    *,
    propagates: bool,
    inv_scale: Tensor | None = None,
    verdict: Verdict | None = None,
) -> list[UnitSummary]:
    """Scales the units whose norms exceed their limits, in place, without a sync.

    Args:
        units: Gradients and weights.
        limits, norm_type, propagates, inv_scale: See `reference_units.unit_coefs`.
        verdict: The verdict on the step; if it skips the step, no unit is scaled. None: not part
            of a guarded step.

    Returns:
        What was clipped, per bucket; empty if the host knows that the step is skipped. Positions
        refer to the lists from which the buckets were made.
    """
    if isinstance(verdict, HostVerdict) and verdict.known.skipped:
        return []
    clipped: list[UnitSummary] = []
    for part in units:
        if not part.starts[-1]:
            continue
        stages = backend.stages(part.device, part.bucket.kind)
        scale = None if inv_scale is None else moved(inv_scale, part.device)
        skips = None
        if verdict is not None and not isinstance(verdict, HostVerdict):
            skips = moved(verdict.found_inf, part.device) != 0
        try:
            values = stages.clip_units(part, limits, norm_type, propagates, scale, skips)
        except UNSUPPORTED_ERRORS as error:
            refuse_wrapped(part.bucket.grads, error)
            raise
        part.bucket.write_back()
        clipped.append(UnitSummary(values, part.bucket.tensor_ids, part.counts))
    return clipped


def with_units(verdict: Verdict, clipped: Sequence[UnitSummary]) -> Verdict:
    """Returns the verdict with what was clipped, and with `clip_coef` that includes it."""
    if not clipped:
        return verdict
    device = verdict.clip_coef.device
    least = [moved(summary.values, device)[0] for summary in clipped]
    # the result is NaN if any coefficient is NaN
    smallest = least[0] if len(least) == 1 else torch.stack(least).amin()
    coef = verdict.clip_coef * smallest
    if isinstance(verdict, HostVerdict):
        known = verdict.known._replace(clip_coef=coef.amin().item())
        return replace(verdict, clip_coef=coef, known=known, clipped_units=tuple(clipped))
    return replace(verdict, clip_coef=coef, clipped_units=tuple(clipped))


def concluded(verdict: Verdict) -> Verdict:
    """Returns the verdict on a finished step, with what the update clipped."""
    if verdict.units is None:
        return verdict
    return with_units(replace(verdict, units=None), verdict.units.clipped)
