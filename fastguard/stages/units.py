"""The adaptive gradient clipping stage: one coefficient per unit (row) of each parameter.

    unit_buckets -> clip_units

I/O: reads gradients and weights once (2N bytes) and writes 8 bytes per unit; then reads and writes
the gradients of the clipped units. With `GuardedOptimizer`, this is the second pass over the
gradients: the first one measures them to decide whether to take the step. The optimizers of
`fastguard.optim` do not need it, since their update clips units itself.
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
from fastguard.stages.contract import HostVerdict, Verdict


def clip_units(
    units: Sequence[UnitBucket],
    limits: Tensor,
    norm_type: float,
    *,
    propagates: bool,
    inv_scale: Tensor | None = None,
    verdict: Verdict | None = None,
) -> Tensor | None:
    """Scales the units whose norms exceed their limits, in place, without a sync.

    Args:
        units: Gradients and weights.
        limits, norm_type, propagates, inv_scale: See `reference_units.unit_coefs`.
        verdict: The verdict on the step; if it skips the step, no unit is scaled. None: not part
            of a guarded step.

    Returns:
        float64 `()`: the smallest coefficient, on the device of the first bucket; None if there
        are no units, or if the host knows that the step is skipped.
    """
    if isinstance(verdict, HostVerdict) and verdict.known.skipped:
        return None
    smallest: list[Tensor] = []
    for part in units:
        if not part.starts[-1]:
            continue
        stages = backend.stages(part.device, part.bucket.kind)
        scale = None if inv_scale is None else moved(inv_scale, part.device)
        skips = None
        if verdict is not None and not isinstance(verdict, HostVerdict):
            skips = moved(verdict.found_inf, part.device) != 0
        try:
            summary = stages.clip_units(part, limits, norm_type, propagates, scale, skips)
        except UNSUPPORTED_ERRORS as error:
            refuse_wrapped(part.bucket.grads, error)
            raise
        part.bucket.write_back()
        smallest.append(summary[0])
    return smallest_of(smallest)


def smallest_of(coefs: Sequence[Tensor]) -> Tensor | None:
    """Returns the smallest of some float64 `()` coefficients, on the device of the first one."""
    if len(coefs) < 2:
        return coefs[0] if coefs else None
    return torch.stack([moved(coef, coefs[0].device) for coef in coefs]).amin()


def with_units(verdict: Verdict, smallest: Tensor | None) -> Verdict:
    """Returns the verdict with `clip_coef` multiplied by the smallest unit coefficient."""
    if smallest is None:
        return verdict
    coef = verdict.clip_coef * moved(smallest, verdict.clip_coef.device)
    if isinstance(verdict, HostVerdict):
        known = verdict.known._replace(clip_coef=coef.amin().item())
        return replace(verdict, clip_coef=coef, known=known)
    return replace(verdict, clip_coef=coef)


def concluded(verdict: Verdict) -> Verdict:
    """Returns the verdict on a finished step, with the coefficients that the update computed."""
    if verdict.units is None:
        return verdict
    return with_units(replace(verdict, units=None), smallest_of(verdict.units.smallest))
