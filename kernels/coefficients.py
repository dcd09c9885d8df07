"""The clip coefficients of all segments, as a part of `decide`.

clip_coef[s]  = min(1, max_norm[s] / (norm[s] + 1e-6), coefficient of a spike)
multiplier[s] = clip_coef[s] * inv_scale, or 1 for a skipped step
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.elements import root


@triton.jit
def clip_coefficient(norm, max_norm):
    """Returns `min(1, max_norm / (norm + 1e-6))`: 1 for a limit of inf, NaN for a limit of NaN."""
    coef = max_norm / (norm + 1e-6)
    coef = tl.where(coef > 1.0, 1.0, coef)  # a NaN is kept
    return tl.where(max_norm == float("inf"), 1.0, coef)


@triton.jit
def store_coefficients(
    summary_ptr,
    max_norm_ptr,
    inv_scale_ptr,
    coef_ptr,
    multiplier_ptr,
    n_segments,
    max_norm_stride,
    spike_coef,
    skip,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,
    PROPAGATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes coefficients and multipliers; returns whether any multiplier is not 1."""
    INF: tl.constexpr = float("inf")
    NAN: tl.constexpr = float("nan")
    lanes = tl.arange(0, BLOCK_SIZE)
    scales = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    i = 0
    while i < n_segments:
        mask = i + lanes < n_segments
        norm = tl.load(summary_ptr + i + lanes, mask=mask, other=0.0)
        if ROOTED == 0:
            norm = root(norm, P, INF_NORM)
        if PROPAGATE:
            nan = tl.load(summary_ptr + n_segments + i + lanes, mask=mask, other=0.0)
            posinf = tl.load(summary_ptr + 2 * n_segments + i + lanes, mask=mask, other=0.0)
            neginf = tl.load(summary_ptr + 3 * n_segments + i + lanes, mask=mask, other=0.0)
            norm = tl.where(posinf + neginf > 0.0, INF, norm)
            norm = tl.where(nan > 0.0, NAN, norm)
        max_norm = tl.load(max_norm_ptr + (i + lanes) * max_norm_stride, mask=mask, other=INF)
        coef = clip_coefficient(norm, max_norm)
        # The smaller of both coefficients; NaN if either is NaN.
        coef = tl.where(spike_coef < coef, spike_coef, coef)
        coef = tl.where(spike_coef == spike_coef, coef, spike_coef)
        multiplier = coef
        if HAS_SCALE:
            multiplier = coef * tl.load(inv_scale_ptr)
        multiplier = tl.where(skip, 1.0, multiplier)
        tl.store(coef_ptr + i + lanes, coef, mask=mask)
        tl.store(multiplier_ptr + i + lanes, multiplier, mask=mask)
        # the condition is true for NaN
        scales = tl.maximum(scales, (mask & (multiplier != 1.0)).to(tl.int32))
        i += BLOCK_SIZE
    return tl.max(scales, axis=0) > 0
