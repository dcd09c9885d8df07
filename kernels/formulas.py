"""The elementwise formulas of `update` (AdamW, Adam, SGD, Lion), and their coefficients.

    AdamW  m <- m + (g - m) * (1 - b1)                       Adam: first  g <- g + p * wd
           v <- v * b2 + (g * g) * (1 - b2)
           w <- max(w, v), with amsgrad; else w = v
           p <- p * (1 - lr * wd) - (m * (lr / bc1)) / (sqrt(w) * (1 / sqrt(bc2)) + eps)
           spike-aware: first, at a reset,  m, v, w <- 0
           g <- sign(g) * sqrt(v * threshold)                where |g| is larger and v > 0
    SGD    g <- g + p * wd                                   if wd is not 0
           m <- m * momentum + g * (1 - dampening)           with momentum
           p <- p - m * lr                                   Nesterov: g + m * momentum for m
    Lion   p <- p * (1 - lr * wd) - sign(m * b1 + g * (1 - b1)) * lr
           m <- m * b2 + g * (1 - b2)

`advance` computes the coefficients; see `fastguard.optim.contract.COEFFICIENTS` for the columns.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.columns import (
    ADDRESS_COLUMNS,
    COEFFICIENT_COLUMNS,
    GROUP_COLUMN,
    HYPER_COLUMNS,
    KEY_COLUMN,
    RESET_COLUMN,
    SIGN_COLUMN,
    SIZE_COLUMN,
    SPIKE_COLUMN,
    STEP_ADDRESS,
    SUM_SCALE_COLUMN,
    TENSOR_COLUMNS,
)
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.rounding import lowbias32

HYPER = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening", "sign", "seed",
    "spike_threshold", "momentum_reset", "reset_warmup",
)  # fmt: skip
ALGORITHMS = {"adamw": 0, "adam": 1, "sgd": 2, "lion": 3}
ADAMW, ADAM, SGD, LION = (tl.constexpr(i) for i in range(4))

ADVANCE_SIZE = 128  # tensors per program
SPIKE_GRACE = tl.constexpr(20)  # `fastguard.optim.options.SPIKE_GRACE`
PI = tl.constexpr(math.pi)


@triton.jit
def coefficients_at(coef_ptr, ARITHMETIC: tl.constexpr):
    """Loads the eight coefficients of a tensor; unused coefficients are arbitrary."""
    return (
        tl.load(coef_ptr).to(ARITHMETIC),
        tl.load(coef_ptr + 1).to(ARITHMETIC),
        tl.load(coef_ptr + 2).to(ARITHMETIC),
        tl.load(coef_ptr + 3).to(ARITHMETIC),
        tl.load(coef_ptr + 4).to(ARITHMETIC),
        tl.load(coef_ptr + 5).to(ARITHMETIC),
        tl.load(coef_ptr + 6).to(ARITHMETIC),
        tl.load(coef_ptr + 7).to(ARITHMETIC),
    )


@triton.jit
def root_of(x, REPRODUCIBLE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Returns the square root, correctly rounded if the update is reproducible."""
    if REPRODUCIBLE and ARITHMETIC == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def without_spikes(g, v, threshold, REPRODUCIBLE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Limits gradient elements to the root of `threshold` times their second moment."""
    bound = root_of(v * threshold, REPRODUCIBLE, ARITHMETIC)
    limited = tl.where(g < 0.0, -bound, bound)
    # The comparison is False for NaN. If v is 0, the bound is 0 too, and would keep the element at
    # 0 forever.
    return tl.where((v > 0.0) & (tl.abs(g) > bound), limited, g)


@triton.jit
def new_values(
    p, g, a, b, c, c0, c1, c2, c3, c4, c5, c6, c7, ALGORITHM: tl.constexpr, N_STATES: tl.constexpr,
    AMSGRAD: tl.constexpr, NESTEROV: tl.constexpr, REPRODUCIBLE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Returns weight and states after a step; unused states are returned unchanged."""
    if ALGORITHM == SGD:
        g = tl.where(c2 != 0.0, g + p * c2, g)
        if N_STATES == 0:
            p = p - g * c3
        else:
            a = a * c0 + g * c1
            if NESTEROV:
                p = p - (g + a * c0) * c3
            else:
                p = p - a * c3
    else:
        if ALGORITHM == LION:
            toward = a * c0 + g * c1
            # The sign of the value; 0 and NaN are kept.
            one = tl.where(toward > 0.0, 1.0, tl.where(toward < 0.0, -1.0, toward))
            p = p * c5 - one * c4
            a = a * c2 + g * c3
        else:
            if ALGORITHM == ADAM:
                g = tl.where(c7 != 0.0, g + p * c7, g)
            a = a + (g - a) * c1
            b = b * c2 + (g * g) * c3
            largest = b
            if AMSGRAD:
                c = tl.where((b > c) | (b != b), b, c)  # the result is NaN if either value is NaN
                largest = c
            denominator = root_of(largest, REPRODUCIBLE, ARITHMETIC) * c6 + c4
            if REPRODUCIBLE and ARITHMETIC == tl.float32:
                step = tl.div_rn(a * c5, denominator)
            else:
                step = (a * c5) / denominator
            if ALGORITHM == ADAMW:
                p = p * c7 - step
            else:
                p = p - step
    return p, a, b, c


@triton.jit
def _store_spikes(c_ptr, h_ptr, s, mask):
    """Stores the columns of a spike-aware update, and returns the warm-up after a reset."""
    threshold = tl.load(h_ptr + 9, mask=mask, other=0.0)
    period = tl.load(h_ptr + 10, mask=mask, other=0.0)
    warmup = tl.load(h_ptr + 11, mask=mask, other=0.0)
    has_reset = (period > 0.0) & (s >= period)
    n = tl.where(period > 0.0, period, 1.0).to(tl.int64)
    since = tl.where(period > 0.0, (s.to(tl.int64) % n).to(tl.float64), s)
    clips = (threshold > 0.0) & (since >= SPIKE_GRACE)
    tl.store(c_ptr + SPIKE_COLUMN, tl.where(clips, threshold, float("inf")), mask=mask)
    reset = tl.where(has_reset & (since == 0.0), 1.0, 0.0)
    tl.store(c_ptr + RESET_COLUMN, reset.to(tl.float64), mask=mask)
    risen = 1.0 - 0.495 * (1.0 + tl.cos(since * (PI / (warmup + 1.0))))
    return tl.where(has_reset & (since < warmup), risen, 1.0)


@triton.jit(
    do_not_specialize=[
        "tensors_ptr", "addresses_ptr", "hyper_ptr", "found_inf_ptr", "coefficients_ptr",
        "n_tensors",
    ]
)  # fmt: skip
def advance_kernel(
    tensors_ptr,  # int64 (n_tensors, TENSOR_COLUMNS)
    addresses_ptr,  # int64 (n_tensors, ADDRESS_COLUMNS)
    hyper_ptr,  # float64 (n_groups, HYPER_COLUMNS)
    found_inf_ptr,  # float32 (1,)
    coefficients_ptr,  # float64 (n_tensors, COEFFICIENT_COLUMNS), written
    n_tensors,
    ALGORITHM: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SPIKES: tl.constexpr,
    CLIPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Increments the step counter of each tensor and computes its coefficients in float64."""
    if tl.load(found_inf_ptr) != 0.0:  # in a skipped step, the coefficients are not read
        return
    t = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = t < n_tensors
    step = tl.full((SIZE,), 1.0, tl.float32)
    if HAS_STEPS:
        address = tl.load(addresses_ptr + ADDRESS_COLUMNS * t + STEP_ADDRESS, mask=mask, other=0)
        step_ptr = address.to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        tl.store(step_ptr, step, mask=mask)
    s = step.to(tl.float64)
    group = tl.load(tensors_ptr + TENSOR_COLUMNS * t + GROUP_COLUMN, mask=mask, other=0)
    h_ptr = hyper_ptr + HYPER_COLUMNS * group
    lr = tl.load(h_ptr, mask=mask, other=0.0)
    beta1 = tl.load(h_ptr + 1, mask=mask, other=0.0)
    beta2 = tl.load(h_ptr + 2, mask=mask, other=0.0)
    eps = tl.load(h_ptr + 3, mask=mask, other=0.0)
    decay = tl.load(h_ptr + 4, mask=mask, other=0.0)
    momentum = tl.load(h_ptr + 5, mask=mask, other=0.0)
    dampening = tl.load(h_ptr + 6, mask=mask, other=0.0)
    sign = tl.load(h_ptr + 7, mask=mask, other=1.0)
    c_ptr = coefficients_ptr + COEFFICIENT_COLUMNS * t
    if ALGORITHM == SGD:
        tl.store(c_ptr, momentum, mask=mask)
        tl.store(c_ptr + 1, tl.where(s == 1.0, 1.0, 1.0 - dampening), mask=mask)
        tl.store(c_ptr + 2, decay, mask=mask)
        tl.store(c_ptr + 3, lr, mask=mask)
    else:
        tl.store(c_ptr, beta1, mask=mask)
        tl.store(c_ptr + 1, 1.0 - beta1, mask=mask)
        tl.store(c_ptr + 2, beta2, mask=mask)
        tl.store(c_ptr + 3, 1.0 - beta2, mask=mask)
        if ALGORITHM == LION:
            tl.store(c_ptr + 4, lr, mask=mask)
            tl.store(c_ptr + 5, 1.0 - lr * decay, mask=mask)
        else:
            bc1 = 1.0 - tl.exp2(s * tl.log2(beta1))  # for beta 0, exp2(-inf) is 0
            bc2 = 1.0 - tl.exp2(s * tl.log2(beta2))
            tl.store(c_ptr + 4, eps, mask=mask)
            rate = lr / bc1
            if SPIKES:
                rate *= _store_spikes(c_ptr, h_ptr, s, mask)
            if CLIPS:
                size = tl.load(tensors_ptr + TENSOR_COLUMNS * t + SIZE_COLUMN, mask=mask, other=1)
                # A term is at most 1 / (1 - beta2), so the sum stays below 2^53 and is exact in
                # float64.
                bits = tl.floor(52.5 - tl.log2(size.to(tl.float64) / (1.0 - beta2)))
                tl.store(c_ptr + SUM_SCALE_COLUMN, tl.exp2(tl.minimum(bits, 30.0)), mask=mask)
            tl.store(c_ptr + 5, rate, mask=mask)
            tl.store(c_ptr + 6, 1.0 / tl.sqrt(bc2), mask=mask)
            if ALGORITHM == ADAMW:
                tl.store(c_ptr + 7, 1.0 - lr * decay, mask=mask)
            else:
                tl.store(c_ptr + 7, decay, mask=mask)
    tl.store(c_ptr + SIGN_COLUMN, sign, mask=mask)
    if STOCHASTIC:
        seed = tl.load(h_ptr + 8, mask=mask, other=0.0).to(tl.int64).to(tl.uint32)
        key = lowbias32(seed ^ lowbias32(s.to(tl.int64).to(tl.uint32)))
        tl.store(c_ptr + KEY_COLUMN, key.to(tl.int64).to(tl.float64), mask=mask)
    else:
        tl.store(c_ptr + KEY_COLUMN, tl.zeros((SIZE,), dtype=tl.float64), mask=mask)


_advance = Launcher(advance_kernel, num_warps=4, fuses=False)


def advance_steps(
    tensors: Tensor,
    addresses: Tensor,
    hyper: Tensor,
    found_inf: Tensor,
    coefficients: Tensor,
    algorithm: int,
    has_steps: bool,
    stochastic: bool,
    spike_aware: bool,
    update_clipping: bool,
) -> None:
    """Increments the step counters and computes the coefficients, unless the step is skipped.

    Args:
        tensors, addresses: From the table of the update.
        hyper: float64 `(G, 12)`, see `fastguard.optim.contract.HYPER`.
        found_inf: float32 `()`.
        coefficients: float64 `(T, 13)`, written unless the step is skipped.
        algorithm: A value of `ALGORITHMS`.
        has_steps: Whether the table contains addresses of step counters.
        stochastic: Whether to compute noise keys.
        spike_aware, update_clipping: Whether to compute the columns that these options need.
    """
    assert hyper.shape[1] == HYPER_COLUMNS.value, hyper.shape
    n = coefficients.shape[0]
    switches = (algorithm, has_steps, stochastic, spike_aware, update_clipping)
    launch = _variant(hyper.device, *switches)
    pointers = (tensors, addresses, hyper, found_inf, coefficients)
    launch(triton.cdiv(n, ADVANCE_SIZE), pointers, n)


@functools.lru_cache(maxsize=64)
def _variant(
    device: torch.device,
    algorithm: int,
    has_steps: bool,
    stochastic: bool,
    spike_aware: bool,
    update_clipping: bool,
) -> Variant:
    return _advance.variant(
        device,
        ALGORITHM=algorithm,
        HAS_STEPS=has_steps,
        STOCHASTIC=stochastic,
        SPIKES=spike_aware,
        CLIPS=update_clipping,
        SIZE=ADVANCE_SIZE,
    )
