"""What is wrong with a step, inside `decide`: NaN and Inf, overflow of a loss scale, bad losses.

    fault = a bad gradient that is not cleaned, a bad loss, or a norm that no float64 holds

Every comparison says what NaN does. The conditions are scalars of one bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def never():
    """A condition that is false."""
    return tl.full((), 0, tl.int32) > 0


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def spread(condition, N: tl.constexpr):
    """One condition in N lanes."""
    return tl.where(condition, tl.full((N,), 1, tl.int32), tl.full((N,), 0, tl.int32)) > 0


@triton.jit
def any_loss_is_lost(
    losses_ptr, given_ptr, n_losses, HAS_GIVEN: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Whether a loss that was given is NaN or infinite."""
    lanes = tl.arange(0, BLOCK_SIZE)
    lost = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    i = 0
    while i < n_losses:
        is_loss = i + lanes < n_losses
        if HAS_GIVEN:
            is_loss = is_loss & (tl.load(given_ptr + i + lanes, mask=is_loss, other=0) > 0)
        loss = tl.load(losses_ptr + i + lanes, mask=is_loss, other=0.0)
        # NaN is not < inf
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
    """The faults of a step, each a condition.

    Returns:
        grad_fault: The gradients are not to be used.
        loss_fault: Nor are they because of a loss.
        too_large: No float64 holds the norm.
        overflow: A loss scaler has found non-finite gradients.
        lowers: All that is wrong is cured by a lower loss scale.
    """
    overflow = never()
    if HAS_OVERFLOW:
        overflow = tl.load(overflow_ptr) > 0.0  # NaN is no overflow, as in the reference
    lowers = never()
    if HAS_FALLS:
        lowers = overflow & (tl.load(falls_ptr) > 0) & (loss_fault == 0)
    too_large = total_norm == float("inf")  # no float64 holds the norm of these finite elements
    if PROPAGATE:
        grad_fault = overflow
        too_large = never()  # clipped to zero, as by torch
        loss_fault = never()
    elif ZERO:
        # Cleaning cures what was counted; a fault that only the scaler saw is not cured by it. What
        # a lower scale cures is not cleaned.
        grad_fault = overflow & ((bad_grad == 0) | lowers)
    else:
        grad_fault = overflow | bad_grad
    return grad_fault, loss_fault, too_large, overflow, lowers
