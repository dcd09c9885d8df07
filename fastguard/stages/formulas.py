"""The formulas of the stages, on scalars and small vectors: norms and clip coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def root(power_sum: Tensor, norm_type: float) -> Tensor:
    """The p-norm that belongs to a power sum."""
    if norm_type == math.inf:
        return power_sum
    return power_sum.sqrt() if norm_type == 2.0 else power_sum.pow(1.0 / norm_type)


LARGEST_POWER = 6.0
"""p up to which a sum of |x|^p stays in float64 for every float32 x: 2**-149 to 2**128."""


def holds_norms(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether what a stage measures of gradients of this dtype are norms in place of power sums."""
    return norm_type != math.inf and (dtype is torch.float64 or norm_type > LARGEST_POWER)


def norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    """float64: the norm of everything, from the norms of its parts along the first dimension.

    Right wherever it is a float64 itself; inf where it is larger than any.
    """
    if not norms.shape[0]:
        return norms.sum(0)
    largest = norms.amax(0)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return root((norms / unit).pow(norm_type).sum(0), norm_type) * unit


EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm

TINY = 2.0**-1022  # smallest normal float64: the least that a spike baseline spreads


def clip_coefficients(norms: Tensor, max_norm: Tensor) -> Tensor:
    """`min(1, max_norm / (norm + 1e-6))`; a limit of inf gives 1 for every norm, NaN a NaN."""
    coef = (max_norm / (norms + EPS)).clamp(max=1.0)  # NaN stays NaN
    return coef.masked_fill(max_norm == math.inf, 1.0)


def propagated_norms(norms: Tensor, nonfinite_counts: Tensor) -> Tensor:
    """The norms as torch gives them: NaN if any element is NaN, else inf if any is infinite.

    Args:
        norms: float64 `(S,)`, of the finite elements.
        nonfinite_counts: `(3, S)`: NaN, +Inf, -Inf.
    """
    nan = nonfinite_counts.select(0, 0) > 0
    infinite = nonfinite_counts.narrow(0, 1, 2).sum(0) > 0
    return torch.where(nan, math.nan, torch.where(infinite, math.inf, norms))


SMALLEST_FACTOR = 2.0**-100
"""The smallest factor of one multiplication; a smaller one would be no normal float32."""


def unscaled(
    summary: Tensor, dtype: torch.dtype, norm_type: float, inv_scale: Tensor | None
) -> Tensor:
    """The power sums, or norms, of `gradients * inv_scale`."""
    if inv_scale is None:
        return summary
    inv = inv_scale.to(device=summary.device, dtype=torch.float64)
    linear = norm_type == math.inf or holds_norms(dtype, norm_type)
    factor = inv if linear else inv.pow(norm_type)
    return torch.cat([summary.narrow(0, 0, 1) * factor, summary.narrow(0, 1, 3)])


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the coefficient for a gradient: float32 below float64, as in torch."""
    return torch.float64 if dtype is torch.float64 else torch.float32
