"""Unit coefficients in plain PyTorch, the reference for the kernel and the CPU implementation.

See `fastguard.stages.agc` for the formula. This module computes tensor by tensor in float64,
without waiting for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard.gradients.transfer import moved
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype, root


def clip_units(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
    skips: Tensor | None = None,
) -> Tensor:
    """Clips the units of one bucket in place.

    Args:
        units, limits, norm_type, propagates, inv_scale: See `unit_coefs`.
        skips: bool `()`: whether the step is skipped, so that nothing changes; None: it is not.

    Returns:
        See `summary_of`; no unit is clipped in a skipped step.
    """
    coefs = unit_coefs(units, limits, norm_type, propagates, inv_scale)
    coefs = coefs if skips is None else torch.where(skips, 1.0, coefs)
    scale_units(units, coefs)
    return summary_of(coefs)


def summary_of(coefs: Tensor) -> Tensor:
    """Returns what was clipped in one bucket.

    Args:
        coefs: float64 `(U,)`, with U > 0: the coefficient of each unit.

    Returns:
        float64 `(4,)`: the smallest coefficient, NaN if any is; the number of clipped units; the
        index of a tensor; and the unit with the smallest coefficient, as an offset from the first
        unit of that tensor. The reference always uses the first tensor.
    """
    smallest, at = coefs.min(0)
    n_clipped, first = (coefs != 1.0).sum().double(), torch.zeros_like(smallest)
    return torch.stack([smallest, n_clipped, first, at.double()])


def unit_coefs(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Computes the coefficient of each unit.

    Args:
        units: Gradients and weights, with U units.
        limits: float64 `(2,)` on the CPU: `clip_factor` and `eps` of `AGC`.
        norm_type: p > 0, or `inf`.
        propagates: True: NaN in a gradient makes the coefficient of its unit NaN, and Inf makes it
            0. False: norms are computed from the finite elements.
        inv_scale: float64 `()`: the factor that unscales the gradients; None: 1.

    Returns:
        float64 `(U,)`: at most 1. A unit with NaN or Inf in its weights is not clipped.
    """
    numbers = moved(limits, units.device)
    parts = [
        tensor_coefs(grad, weight, n, numbers, norm_type, propagates, inv_scale)
        for grad, weight, n in zip(units.bucket.grads, units.weights, units.counts, strict=True)
        if n
    ]
    if not parts:
        return torch.ones(0, dtype=torch.float64, device=units.device)
    return torch.cat(parts)


def tensor_coefs(
    grad: Tensor,
    weight: Tensor,
    n: int,
    numbers: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None,
) -> Tensor:
    """Returns the coefficients of the n units of one tensor, float64 `(n,)`.

    Args:
        grad, weight: The gradient and the weight of the tensor.
        n: Number of units.
        numbers: float64 `(2,)` on the same device: `clip_factor` and `eps`.
        norm_type, propagates, inv_scale: See `unit_coefs`.
    """
    clip_factor, eps = numbers.unbind()  # placeholders do not support `tolist`
    norm = _unit_norms(grad, n, norm_type, propagates)
    norm = norm if inv_scale is None else norm * inv_scale
    limit = clip_factor * _unit_norms(weight, n, norm_type, True).clamp(min=eps)
    return coefficients(norm, limit)


def coefficients(norm: Tensor, limit: Tensor) -> Tensor:
    """Returns `limit / norm` where the norm is above the limit, else 1.

    A NaN limit gives 1, since no norm is above it; a NaN norm gives NaN.
    """
    return torch.where((norm > limit) | norm.isnan(), limit / norm, 1.0)


def _unit_norms(x: Tensor, n: int, norm_type: float, propagates: bool) -> Tensor:
    """Returns the norms of the n units of a tensor, float64 `(n,)`."""
    rows = x.double().reshape(n, -1)
    magnitude = torch.where(rows.isfinite(), rows, 0.0).abs()  # `isfinite` is False for NaN
    largest = magnitude.amax(1)
    if norm_type == math.inf:
        norms = largest
    else:
        unit = torch.where(largest > 0, largest, 1.0)
        norms = root((magnitude / unit[:, None]).pow(norm_type).sum(1), norm_type) * unit
    if not propagates:
        return norms
    norms = torch.where(rows.isinf().any(1), math.inf, norms)
    return torch.where(rows.isnan().any(1), math.nan, norms)


def scale_units(units: UnitBucket, coefs: Tensor) -> None:
    """Multiplies the gradient of each unit by its coefficient, in place.

    Args:
        units: The gradients, changed in place.
        coefs: float64 `(U,)`; 1 leaves a unit bitwise unchanged.
    """
    starts = units.starts
    for grad, n, start in zip(units.bucket.grads, units.counts, starts[:-1], strict=True):
        if not n:
            continue
        own = coefs.narrow(0, start, n)
        own = own.reshape(n, *[1] * (grad.dim() - 1)) if grad.dim() else own.reshape(())
        first = torch.where(own < SMALLEST_FACTOR, SMALLEST_FACTOR, 1.0)
        first = first.to(factor_dtype(grad.dtype))
        factor = (own / first).to(first.dtype)
        product = (grad.to(factor.dtype) * first * factor).to(grad.dtype)
        # a product of 1 and NaN may change bits of the NaN
        grad.copy_(torch.where(own == 1, grad, product))
