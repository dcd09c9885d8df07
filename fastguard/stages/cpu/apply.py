"""apply on a CPU: reads the multipliers, and touches memory only where there is something to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.cpu_threads import Tensors, in_pieces
from fastguard.stages.cpu.power_sums import by_number
from fastguard.stages.formulas import (
    SMALLEST_FACTOR,
    factor_dtype,
)

CPU = torch.device("cpu")
FACTORS = {torch.float32: np.float32, torch.float64: np.float64}
HALF = (torch.float16, torch.bfloat16)
_IGNORED = torch.zeros((), device=CPU)  # where the scaler's operation would say that it met Inf


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
    """The long runs, where there are any: one multiplication instead of one a tensor.

    Not for NaN or Inf, which would reach the zeros between the gradients of a run."""
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
        grads[0].mul_(multiplier)  # rounds it to what a tensor would hold
        return
    # A tensor, because _foreach_mul_ by a Python float costs six times as much on a CPU.
    factor = torch.from_numpy(np.array(multiplier, FACTORS[factor_dtype(dtype)]))
    try:
        if dtype in HALF:
            _multiply_half(grads, factor)
        else:
            torch._foreach_mul_(grads, factor)
    except RuntimeError:  # before any is changed: a list that is written to may hold no such view
        if not any(map(Tensor.is_neg, grads)):
            raise
        for grad in grads:
            grad.mul_(factor)


def _multiply_half(grads: Tensors, factor: Tensor) -> None:
    """The same bits as `_foreach_mul_`, which casts the float32 factor anew for each tensor: the
    operation of `GradScaler` takes 0.2 to 0.5 of its time.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(grads, _IGNORED, factor)
    torch.autograd.graph.increment_version(grads)  # which that operation does not
