"""Detects the faults of a step, as a part of `decide`: NaN, Inf, overflow, non-finite losses.

    fault = a bad gradient that is not cleaned, a bad loss, or a norm too large for float64

Comments on comparisons give the result for NaN. Conditions are one-bit scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def never():
    """Returns a false condition."""
    return tl.full((), 0, tl.int32) > 0


@triton.jit
def any_of(condition):
    """Returns whether a condition is true in any lane."""
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def spread(condition, N: tl.constexpr):
    """Broadcasts a condition to N lanes."""
    return tl.where(condition, tl.full((N,), 1, tl.int32), tl.full((N,), 0, tl.int32)) > 0


@triton.jit
def any_loss_nonfinite(
    losses_ptr, given_ptr, n_losses, HAS_GIVEN: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Returns whether any loss that was passed is NaN or infinite."""
    lanes = tl.arange(0, BLOCK_SIZE)
    lost = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    i = 0
    while i < n_losses:
        is_loss = i + lanes < n_losses
        if HAS_GIVEN:
            is_loss = is_loss & (tl.load(given_ptr + i + lanes, mask=is_loss, other=0) > 0)
        loss = tl.load(losses_ptr + i + lanes, mask=is_loss, other=0.0)
        # the condition is also true for NaN
        lost = tl.maximum(lost, ((tl.abs(loss) < float("inf")) == 0).to(tl.int32))
        i += BLOCK_SIZE
    return tl.max(lost, axis=0) > 0


@triton.jit
def faults_of(
    total_norm,
    bad_grad,
    overflow_ptr,
    falls_ptr,
    loss_fault,
    ZERO: tl.constexpr,
    PROPAGATE: tl.constexpr,
    HAS_OVERFLOW: tl.constexpr,
    HAS_FALLS: tl.constexpr,
):
    """Returns the faults of a step as conditions.

    Returns:
        grad_fault: The step must be skipped because of the gradients.
        loss_fault: The step must be skipped because of a loss.
        too_large: The norm is too large for float64.
        overflow: A loss scaler found non-finite gradients.
        scale_fixes: The only fault is an overflow, which the scaler removes by lowering its scale.
    """
    overflow = never()
    if HAS_OVERFLOW:
        # the comparison is false for NaN, as in the reference
        overflow = tl.load(overflow_ptr) > 0.0
    scale_fixes = never()
    if HAS_FALLS:
        scale_fixes = overflow & (tl.load(falls_ptr) > 0) & (loss_fault == 0)
    too_large = total_norm == float("inf")  # the norm of the finite elements overflows float64
    if PROPAGATE:
        grad_fault = overflow
        too_large = never()  # in propagate mode, such gradients are clipped to zero, as in torch
        loss_fault = never()
    elif ZERO:
        # Cleaning removes the non-finite elements that were counted, but not an overflow that only
        # the scaler found. If a lower scale removes the fault, nothing is cleaned.
        grad_fault = overflow & ((bad_grad == 0) | scale_fixes)
    else:
        grad_fault = overflow | bad_grad
    return grad_fault, loss_fault, too_large, overflow, scale_fixes
