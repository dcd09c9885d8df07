"""Update clipping: lowers the learning rate of each tensor by the mean square of its update.

    sum[t]   = sum of int64((g / max(sqrt(w) / sqrt(bc2), eps))^2 * scale[t])
    r        = sum[t] / (scale[t] * size[t])
    lr[t]   <- lr[t] / sqrt(r)                  where r > 1

g and w are the gradient and the second moment as in `update`, which computes both a second time.
The terms of a sum are integers, so neither the order of additions nor the cut into chunks has an
effect, and atomic additions are deterministic. A term that is NaN or infinite is left out, so that
a bad element does not affect other elements.

Additional I/O per element of AdamW: 8 bytes in float32 (36 instead of 28), 6 with 16-bit gradients
and float32 moments. There are two additional launches, which write one number per tensor.

Machine code for sm_90, per element: 33 instructions in float32 (32 registers), 78 in bfloat16 with
spikes and IEEE operations (55). With spikes, the update itself takes 36 instead of 27 in float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.columns import (
    ADDRESS_COLUMNS,
    COEFFICIENT_COLUMNS,
    GRADIENT,
    RESET_COLUMN,
    SIZE_COLUMN,
    SPIKE_COLUMN,
    STATE,
    SUM_SCALE_COLUMN,
    TENSOR_COLUMNS,
    UPDATE_COLUMNS,
)
from fastguard.kernels.elements import TRITON_DTYPES, array_at, as_arithmetic
from fastguard.kernels.formulas import ADVANCE_SIZE, root_of, without_spikes
from fastguard.kernels.launch import WARP, Launcher, Variant
from fastguard.kernels.update_chunks import (
    SLOW_SIZE,
    THREADS,
    chunk_at,
    factors_of,
    multiplier_at,
    scaled,
)
from fastguard.kernels.update_table import Arrays, UpdateTable


@triton.jit
def terms_of(
    g_ptr, b_ptr, c_ptr, at, mask, clean, scale, factor, threshold, reset, c2, c3, c4, c6,
    sum_scale, AMSGRAD: tl.constexpr, REPRODUCIBLE: tl.constexpr, SPIKES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    """Returns the terms of the elements `at`, int64."""
    g = as_arithmetic(tl.load(g_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    v = as_arithmetic(tl.load(b_ptr + at, mask=mask, other=0.0), ARITHMETIC)
    g = scaled(g, clean, scale, factor)
    if SPIKES:
        v = tl.where(reset, 0.0, v)
        g = without_spikes(g, v, threshold, REPRODUCIBLE, ARITHMETIC)
    v = v * c2 + (g * g) * c3
    if AMSGRAD:
        w = as_arithmetic(tl.load(c_ptr + at, mask=mask, other=0.0), ARITHMETIC)
        if SPIKES:
            w = tl.where(reset, 0.0, w)
        v = tl.where((v > w) | (v != v), v, w)  # the result is NaN if either value is NaN
    denominator = root_of(v, REPRODUCIBLE, ARITHMETIC) * c6
    denominator = tl.where((denominator > c4) | (denominator != denominator), denominator, c4)
    if REPRODUCIBLE and ARITHMETIC == tl.float32:
        x = tl.div_rn(g, denominator)
    else:
        x = g / denominator
    terms = (x * x) * sum_scale
    terms = tl.where(terms < float("inf"), terms, 0.0)  # the comparison is False for NaN
    return tl.where(mask, terms, 0.0).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "chunks_ptr", "tensors_ptr", "addresses_ptr", "coefficients_ptr", "multiplier_ptr",
        "clean_ptr", "found_inf_ptr", "sums_ptr", "n_chunks",
    ]
)  # fmt: skip
def ratio_kernel(
    chunks_ptr,  # int64 (n_chunks, UPDATE_COLUMNS)
    tensors_ptr,  # int64 (n_tensors, TENSOR_COLUMNS)
    addresses_ptr,  # int64 (n_tensors, ADDRESS_COLUMNS)
    coefficients_ptr,  # float64 (n_tensors, COEFFICIENT_COLUMNS)
    multiplier_ptr,  # float64 (n_segments,)
    clean_ptr,  # float32 (1,)
    found_inf_ptr,  # float32 (1,)
    sums_ptr,  # int64 (n_tensors,), added to
    n_chunks,
    GRAD: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    AMSGRAD: tl.constexpr,
    REPRODUCIBLE: tl.constexpr,
    SPIKES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VEC: tl.constexpr,
):
    """Adds the terms of all chunks to the sums of their tensors, unless the step is skipped."""
    if tl.load(found_inf_ptr) != 0.0:  # the condition is also true for NaN
        return
    clean = tl.load(clean_ptr) != 0.0
    k = tl.program_id(0)
    while k < n_chunks:
        row_ptr = chunks_ptr + UPDATE_COLUMNS * k
        tensor, first, n, n_vec = chunk_at(row_ptr, VEC)
        address_ptr = addresses_ptr + ADDRESS_COLUMNS * tensor
        g_at = array_at(address_ptr, GRADIENT, first, GRAD)
        b_at = array_at(address_ptr, STATE + 1, first, B)
        c_at = array_at(address_ptr, STATE + 2, first, C)
        coef_ptr = coefficients_ptr + COEFFICIENT_COLUMNS * tensor
        c2 = tl.load(coef_ptr + 2).to(ARITHMETIC)
        c3 = tl.load(coef_ptr + 3).to(ARITHMETIC)
        c4 = tl.load(coef_ptr + 4).to(ARITHMETIC)
        c6 = tl.load(coef_ptr + 6).to(ARITHMETIC)
        sum_scale = tl.load(coef_ptr + SUM_SCALE_COLUMN).to(ARITHMETIC)
        threshold = tl.load(coef_ptr + SPIKE_COLUMN).to(ARITHMETIC) if SPIKES else c2
        reset = tl.load(coef_ptr + RESET_COLUMN) != 0.0 if SPIKES else clean
        scale, factor = factors_of(multiplier_at(row_ptr, multiplier_ptr), coef_ptr, ARITHMETIC)

        g_ptr = tl.multiple_of(g_at.to(tl.pointer_type(GRAD)), VEC * GRAD.primitive_bitwidth // 8)
        b_ptr = tl.multiple_of(b_at.to(tl.pointer_type(B)), VEC * B.primitive_bitwidth // 8)
        c_ptr = tl.multiple_of(c_at.to(tl.pointer_type(C)), VEC * C.primitive_bitwidth // 8)
        total = tl.zeros((BLOCK_SIZE,), dtype=tl.int64)
        i = 0
        while i < n_vec:
            at = i + tl.arange(0, BLOCK_SIZE)
            total += terms_of(
                g_ptr, b_ptr, c_ptr, at, at < n_vec, clean, scale, factor, threshold, reset,
                c2, c3, c4, c6, sum_scale, AMSGRAD, REPRODUCIBLE, SPIKES, ARITHMETIC,
            )  # fmt: skip
            i += BLOCK_SIZE
        rest = tl.zeros((SLOW_SIZE,), dtype=tl.int64)
        i = n_vec
        while i < n:
            at = i + tl.arange(0, SLOW_SIZE)
            rest += terms_of(
                g_at.to(tl.pointer_type(GRAD)), b_at.to(tl.pointer_type(B)),
                c_at.to(tl.pointer_type(C)), at, at < n, clean, scale, factor, threshold, reset,
                c2, c3, c4, c6, sum_scale, AMSGRAD, REPRODUCIBLE, SPIKES, ARITHMETIC,
            )  # fmt: skip
            i += SLOW_SIZE
        tl.atomic_add(sums_ptr + tensor, tl.sum(total, axis=0) + tl.sum(rest, axis=0))
        k += tl.num_programs(0)


@triton.jit(
    do_not_specialize=[
        "tensors_ptr", "sums_ptr", "found_inf_ptr", "coefficients_ptr", "n_tensors",
    ]
)  # fmt: skip
def rate_kernel(
    tensors_ptr,  # int64 (n_tensors, TENSOR_COLUMNS)
    sums_ptr,  # int64 (n_tensors,)
    found_inf_ptr,  # float32 (1,)
    coefficients_ptr,  # float64 (n_tensors, COEFFICIENT_COLUMNS), written
    n_tensors,
    SIZE: tl.constexpr,
):
    """Lowers the learning rate in the coefficients of each tensor, in float64."""
    if tl.load(found_inf_ptr) != 0.0:  # in a skipped step, the coefficients are not read
        return
    t = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = t < n_tensors
    c_ptr = coefficients_ptr + COEFFICIENT_COLUMNS * t
    size = tl.load(tensors_ptr + TENSOR_COLUMNS * t + SIZE_COLUMN, mask=mask, other=1)
    whole = tl.load(c_ptr + SUM_SCALE_COLUMN, mask=mask, other=1.0) * size.to(tl.float64)
    total = tl.load(sums_ptr + t, mask=mask, other=0).to(tl.float64)
    ratio = total / whole  # the ratio is NaN for an empty tensor
    factor = tl.where(ratio > 1.0, 1.0 / tl.sqrt(ratio), 1.0)
    rate = tl.load(c_ptr + 5, mask=mask, other=0.0)
    kept = tl.load(c_ptr + 7, mask=mask, other=0.0)
    tl.store(c_ptr + 5, rate * factor, mask=mask)
    tl.store(c_ptr + 7, 1.0 - (1.0 - kept) * factor, mask=mask)


_fused = Launcher(ratio_kernel, THREADS // WARP)
_exact = Launcher(ratio_kernel, THREADS // WARP, fuses=False)
_rate = Launcher(rate_kernel, num_warps=4, fuses=False)


def lower_rates(
    table: UpdateTable,
    coefficients: Tensor,
    multiplier: Tensor,
    clean: Tensor,
    found_inf: Tensor,
    arrays: Arrays,
    programs: int,
    spike_aware: bool,
    reproducible: bool,
) -> None:
    """Lowers the learning rates in the coefficients of T tensors, without a sync.

    Args:
        table: The table of the update.
        coefficients: float64 `(T, 13)`, from `advance_steps`; columns 5 and 7 are written.
        multiplier, clean, found_inf: As in `update_arrays`.
        arrays: The tensors, which are only read.
        programs: Size of the grid.
        spike_aware, reproducible: See `fastguard.optim.contract.Update`.
    """
    layout, n = table.layout, coefficients.shape[0]
    sums = torch.zeros(n, dtype=torch.int64, device=coefficients.device)
    moments = tuple(state[0].dtype for state in arrays.states[1:])
    sum_up = _variant(
        coefficients.device, arrays.weights[0].dtype, arrays.gradients[0].dtype, moments,
        arrays.vector, spike_aware, reproducible,
    )  # fmt: skip
    pointers = (
        layout.chunks, layout.tensors, table.addresses, coefficients, multiplier, clean,
        found_inf, sums,
    )  # fmt: skip
    sum_up(min(programs, layout.n_chunks), pointers, layout.n_chunks)
    lower = _rate_variant(coefficients.device)
    lower(triton.cdiv(n, ADVANCE_SIZE), (layout.tensors, sums, found_inf, coefficients), n)


@functools.lru_cache(maxsize=256)
def _variant(
    device: torch.device,
    parameter: torch.dtype,
    gradient: torch.dtype,
    moments: tuple[torch.dtype, ...],
    vector: int,
    spike_aware: bool,
    reproducible: bool,
) -> Variant:
    constants = constants_of(parameter, gradient, moments, vector, spike_aware, reproducible)
    return (_exact if reproducible else _fused).variant(device, **constants)


def constants_of(
    parameter: torch.dtype,
    gradient: torch.dtype,
    moments: tuple[torch.dtype, ...],
    vector: int,
    spike_aware: bool,
    reproducible: bool,
) -> dict[str, object]:
    """Returns the constants of the kernel, in order.

    Args:
        parameter, gradient: Dtypes of the weights and gradients.
        moments: Dtypes of the second moment, and of its maximum with amsgrad.
        vector: Elements per vector; see `update.vector_size`.
        spike_aware, reproducible: See `fastguard.optim.contract.Update`.
    """
    return {
        "GRAD": TRITON_DTYPES[gradient],
        "B": TRITON_DTYPES[moments[0]],
        "C": TRITON_DTYPES[moments[-1]],
        "ARITHMETIC": tl.float64 if parameter is torch.float64 else tl.float32,
        "AMSGRAD": len(moments) == 2,
        "REPRODUCIBLE": reproducible,
        "SPIKES": spike_aware,
        "BLOCK_SIZE": THREADS * vector,
        "VEC": vector,
    }


@functools.cache
def _rate_variant(device: torch.device) -> Variant:
    return _rate.variant(device, SIZE=ADVANCE_SIZE)
