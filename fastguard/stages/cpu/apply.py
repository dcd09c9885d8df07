"""The apply stage on a CPU: reads the multipliers, and changes only gradients that need it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.tensor_kinds import lasting
from fastguard.gradients.vectors import Tensors, in_pieces
from fastguard.stages.cpu.measure import by_number
from fastguard.stages.formulas import (
    SMALLEST_FACTOR,
    factor_dtype,
)

CPU = torch.device("cpu")
FACTORS: dict[torch.dtype, type[np.float32 | np.float64]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
}
HALF = (torch.float16, torch.bfloat16)
with lasting():
    # output `found_inf` of the scaler's operation, which is not used
    _IGNORED = torch.zeros((), device=CPU)


def apply(
    bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
) -> None:
    """Scales and cleans one bucket in place: see `fastguard.stages.reference.apply`."""
    _apply_where_needed(bucket, multiplier.tolist(), bool(clean))


def _apply_where_needed(bucket: GradBucket, multiplier: list[float], clean: bool) -> None:
    if clean:
        found = bucket.memo.nonfinite
        positions = range(len(bucket.grads)) if found is None else found
        for grad in in_pieces([bucket.grads[position] for position in positions]):
            grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    segment = bucket.segment
    if segment is not None:
        pieces = _pieces(bucket, segment, multiplier[segment])
        sizes = bucket.sizes if pieces is bucket.grads else None
        _multiply(pieces, multiplier[segment], bucket.dtype, sizes)
        return
    pairs = zip(bucket.segment_ids, bucket.grads, strict=True)
    for s, grads in by_number(pairs).items():
        _multiply(grads, multiplier[s], bucket.dtype)


def _pieces(bucket: GradBucket, segment: int, multiplier: float) -> list[Tensor]:
    """Returns the runs of a segment, if any: one multiplication per run, not one per tensor.

    With a NaN or Inf multiplier, returns single gradients, because the zeros between the gradients
    of a run must remain zeros.
    """
    if bucket.runs is None or not math.isfinite(multiplier):
        return bucket.grads
    return [run.flat for run in bucket.runs if run.segment == segment]


def _multiply(
    grads: Tensors, multiplier: float, dtype: torch.dtype, sizes: Sequence[int] | None = None
) -> None:
    if multiplier == 1.0:
        return
    grads = in_pieces(grads, sizes)
    while dtype is not torch.float64 and 0.0 < multiplier < SMALLEST_FACTOR:
        torch._foreach_mul_(grads, torch.tensor(SMALLEST_FACTOR, device=CPU))
        multiplier /= SMALLEST_FACTOR
    if len(grads) == 1:
        grads[0].mul_(multiplier)  # rounds the factor in the same way as _foreach_mul_
        return
    # Multiplies by a tensor, since _foreach_mul_ by a Python float takes six times as long on a
    # CPU.
    factor = torch.from_numpy(np.array(multiplier, FACTORS[factor_dtype(dtype)]))
    try:
        if dtype in HALF:
            _multiply_half(grads, factor)
        else:
            torch._foreach_mul_(grads, factor)
    # foreach cannot write to negative views, and raises this error before any change
    except RuntimeError:
        if not any(map(Tensor.is_neg, grads)):
            raise
        for grad in grads:
            grad.mul_(factor)


def _multiply_half(grads: Tensors, factor: Tensor) -> None:
    """Multiplies 16-bit gradients, with the same bits as `_foreach_mul_`.

    Uses the operation of `GradScaler`, which takes 20 to 50 % of the time of `_foreach_mul_`. The
    latter casts the float32 factor again for each tensor.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(grads, _IGNORED, factor)
    # the operation itself does not increment versions
    torch.autograd.graph.increment_version(grads)
