"""Formulas shared by the stages, on scalars and small vectors: norms and clip coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def root(power_sum: Tensor, norm_type: float) -> Tensor:
    """Returns the p-norm for a power sum."""
    if norm_type == math.inf:
        return power_sum
    return power_sum.sqrt() if norm_type == 2.0 else power_sum.pow(1.0 / norm_type)


LARGEST_POWER = 6.0
"""Largest p for which |x|^p of every float32 x (2**-149 to 2**128) is in the float64 range."""


def holds_norms(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether the measure stage yields norms instead of power sums for gradients of this dtype."""
    return norm_type != math.inf and (dtype is torch.float64 or norm_type > LARGEST_POWER)


def norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    """Combines norms of parts, along the first dimension, into the norm of the whole (float64).

    The result is accurate whenever it is in the float64 range, and inf if it is larger.
    """
    if not norms.shape[0]:
        return norms.sum(0)
    largest = norms.amax(0)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return root((norms / unit).pow(norm_type).sum(0), norm_type) * unit


EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds this number to the norm

TINY = 2.0**-1022  # smallest normal float64; the lower bound for the std of a spike baseline


def clip_coefficients(norms: Tensor, max_norm: Tensor) -> Tensor:
    """Returns `min(1, max_norm / (norm + 1e-6))`.

    If `max_norm` is inf, the result is 1 for every norm, even for NaN. Otherwise the result is NaN
    where the norm is.
    """
    coef = (max_norm / (norms + EPS)).clamp(max=1.0)  # `clamp` keeps NaN
    return coef.masked_fill(max_norm == math.inf, 1.0)


def propagated_norms(norms: Tensor, nonfinite_counts: Tensor) -> Tensor:
    """Returns the norms as torch computes them: NaN if any element is NaN, else inf if any is Inf.

    Args:
        norms: float64 `(S,)`: norms of the finite elements.
        nonfinite_counts: `(3, S)`: numbers of NaN, +Inf and -Inf elements.
    """
    nan = nonfinite_counts.select(0, 0) > 0
    infinite = nonfinite_counts.narrow(0, 1, 2).sum(0) > 0
    return torch.where(nan, math.nan, torch.where(infinite, math.inf, norms))


SMALLEST_FACTOR = 2.0**-100
"""Smallest factor of one multiplication. Smaller factors are split in two, so that each part is a
normal float32.
"""


def unscaled(
    summary: Tensor, dtype: torch.dtype, norm_type: float, inv_scale: Tensor | None
) -> Tensor:
    """Returns the summary of `gradients * inv_scale`, given the summary of the gradients."""
    if inv_scale is None:
        return summary
    inv = inv_scale.to(device=summary.device, dtype=torch.float64)
    linear = norm_type == math.inf or holds_norms(dtype, norm_type)
    factor = inv if linear else inv.pow(norm_type)
    return torch.cat([summary.narrow(0, 0, 1) * factor, summary.narrow(0, 1, 3)])


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the scale factor: float64 for float64 gradients, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
