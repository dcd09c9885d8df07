"""The update: one pass over gradient, state and weight that also applies the verdict.

    g <- 0 where g is non-finite and the verdict cleans
    g <- g * multiplier[segment] * sign         clip coefficient and unscaling, in registers

    AdamW, Adam, SGD, Lion: the formulas of `fastguard.optim.reference`, operation by operation

Update clipping lowers the learning rates before this pass: see `update_clipping`.

With limits of units (rows), a chunk holds whole rows, and a program processes row by row: it
computes the norms of gradient and weight as `units` does, and then updates the row while both are
still in L1 or L2. Nothing more is read from memory, except a 16-bit weight that has a float32
master. Rows of more than `LONGEST_ROW` elements would keep a single program busy. Their
coefficients are therefore computed before the update, as multipliers of separate segments.

I/O per element, AdamW: 28 bytes in float32; 14 in bfloat16; 28 with bfloat16 weights and gradients
and a float32 master and moments, 26 with a remainder in place of the master. The gradient is never
written. A skipped step reads one scalar per program and writes nothing.

    chunks        int64 (C, 6): tensor, first element, elements, whether vectors are aligned,
                  segment, elements per unit
    tensors       int64 (T, 5): group, counter of the first element, elements, first chunk, chunks
    addresses     int64 (T, 8): weight, gradient, up to three states, master, step
    coefficients  float64 (T, 13): written by `advance`, one number per use of a hyper-parameter

Hyper-parameters are read from memory, and are not constants of the kernel. Every thread processes
the same number of elements of each array, so that narrower arrays use narrower loads, and no layout
is converted through shared memory. The elements after the last whole vector, and tensors with an
unaligned array, are processed element by element.

REPRODUCIBLE uses IEEE division and square root and no fused multiply-add, which gives the bits of
the reference on every device. Otherwise, both are approximate (2 ulps) and products are fused into
sums.

Lab table, one vector of each array per thread (sass: machine code for sm_90; torch's own fused
AdamW through the same compiler takes 60 instructions per element in fp32, 65 in bf16):

| AdamW                       | registers | loads + stores of 128 (64) bits | instructions |
|-----------------------------|-----------|---------------------------------|--------------|
| fp32                        | 53        | 4 + 3                           | 27.0         |
| fp32, reproducible          | 60        | 4 + 3                           | 51.8         |
| fp32, spike-aware           | 55        | 4 + 3                           | 36.0         |
| bf16                        | 72        | 4 + 3                           | 29.6         |
| bf16, stochastic            | 80        | 4 + 3                           | 57.0         |
| fp16, stochastic, fp32 m, v | 60        | 2 (2) + 2 (1)                   | 54.5         |
| bf16, fp32 master, m, v     | 56        | 3 (1) + 3 (1)                   | 28.7         |
| bf16, remainder, fp32 m, v  | 56        | 2 (3) + 2 (2)                   | 35.0         |
| with statistics: fp32       | 79        | 4 + 3                           | 47.5         |
|     bf16, stochastic        | 121       | 4 + 3                           | 79.2         |
|     remainder               | 80        | 2 (3) + 2 (2)                   | 56.8         |

With limits of units (90 to 106 registers) or statistics, there are two programs per multiprocessor
instead of three.

One of the instructions is the second product for multipliers below 2^-100. A branch around that
product, shared with cleaning, was expected to save the instruction, but saved nothing. Coefficients
are read before the loop; inside the loop they cost 3.5 instructions per element, since a store
might have changed them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels import units
from fastguard.kernels.columns import (
    ADDRESS_COLUMNS,
    COEFFICIENT_COLUMNS,
    COUNTER_COLUMN,
    GRADIENT,
    KEY_COLUMN,
    MASTER,
    RESET_COLUMN,
    SPIKE_COLUMN,
    STATE,
    TENSOR_COLUMNS,
    UPDATE_COLUMNS,
    UPDATE_ROW,
    WEIGHT,
)
from fastguard.kernels.elements import array_at
from fastguard.kernels.formulas import coefficients_at
from fastguard.kernels.units import unit_coef
from fastguard.kernels.update_chunks import SLOW_SIZE, chunk_at, factors_of, multiplier_at
from fastguard.kernels.update_elements import REMAINDER, update_elements
from fastguard.kernels.update_statistics import statistics_of

UNIT_BYTES = tl.constexpr(units.PLAIN.block_bytes)


@triton.jit
def is_aligned(address, n, DTYPE: tl.constexpr):
    """Whether n elements at an address begin and end at multiples of 16 bytes."""
    return ((address | n * (DTYPE.primitive_bitwidth // 8)) & 15) == 0


@triton.jit(
    do_not_specialize=[
        "chunks_ptr", "tensors_ptr", "addresses_ptr", "coefficients_ptr", "multiplier_ptr",
        "clean_ptr", "found_inf_ptr", "limits_ptr", "clipped_ptr", "partials_ptr", "n_chunks",
    ]
)  # fmt: skip
def update_kernel(
    chunks_ptr,  # int64 (n_chunks, UPDATE_COLUMNS)
    tensors_ptr,  # int64 (n_tensors, TENSOR_COLUMNS)
    addresses_ptr,  # int64 (n_tensors, ADDRESS_COLUMNS)
    coefficients_ptr,  # float64 (n_tensors, COEFFICIENT_COLUMNS)
    multiplier_ptr,  # float64 (n_segments,)
    clean_ptr,  # float32 (1,)
    found_inf_ptr,  # float32 (1,)
    limits_ptr,  # float64 (3,): clip_factor, eps, inverse of the loss scale
    clipped_ptr,  # float64 (n_programs, 4): what was clipped, see `update_launch`; written
    partials_ptr,  # float64 (3, n_chunks): see `update_statistics`, written
    n_chunks,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    A: tl.constexpr,  # dtypes of the states; arbitrary for missing ones
    B: tl.constexpr,
    C: tl.constexpr,
    ALGORITHM: tl.constexpr,
    N_STATES: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NESTEROV: tl.constexpr,
    REPRODUCIBLE: tl.constexpr,
    SPIKES: tl.constexpr,
    UNITS: tl.constexpr,  # whether to clip units; if not, limits and clipped are not accessed
    STATISTICS: tl.constexpr,  # whether to compute statistics; if not, partials are not written
    PROPAGATES: tl.constexpr,  # see `units`
    EXACT_BF16: tl.constexpr,  # rounds with integers, since the interpreter truncates
    BLOCK_SIZE: tl.constexpr,
    VEC: tl.constexpr,
):
    ARITHMETIC: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    X: tl.constexpr = tl.int16 if MASTER_KIND == REMAINDER else tl.float32
    LANES: tl.constexpr = BLOCK_SIZE // VEC
    tl.static_assert(LANES == SLOW_SIZE)
    if UNITS:
        clipped_ptr += 4 * tl.program_id(0)
        tl.store(clipped_ptr, 1.0)
        tl.store(clipped_ptr + 1, 0.0)
        tl.store(clipped_ptr + 2, 0.0)
        tl.store(clipped_ptr + 3, 0.0)
    if tl.load(found_inf_ptr) != 0.0:  # the condition is also true for NaN
        return
    clean = tl.load(clean_ptr) != 0.0
    done = tl.full((), 0, tl.int32)  # elements of the chunk in earlier units
    n_clipped = tl.full((), 0, tl.int32)
    # Statistics of earlier units. The compiler removes all unused statistics.
    done_squares, done_changes = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    done_bad = tl.full((), 0, tl.int32)
    k = tl.program_id(0)
    while k < n_chunks:
        # Goes backwards, since the gradients that measure read last are still in L2.
        row_ptr = chunks_ptr + UPDATE_COLUMNS * (n_chunks - 1 - k)
        tensor, first, n, n_vec = chunk_at(row_ptr, VEC)
        in_chunk, limited = n, tl.load(row_ptr + UPDATE_ROW).to(tl.int32)
        if UNITS:  # processes one unit at a time
            n = tl.where(limited > 0, limited, n)
            n_vec = tl.where(n_vec > 0, n // VEC * VEC, 0)
            first += done
        address_ptr = addresses_ptr + ADDRESS_COLUMNS * tensor
        p_at = array_at(address_ptr, WEIGHT, first, PARAM)
        g_at = array_at(address_ptr, GRADIENT, first, GRAD)
        multiplier = multiplier_at(row_ptr, multiplier_ptr)
        if UNITS:
            if limited > 0:
                coef = unit_coef(
                    p_at, g_at, n, is_aligned(p_at, n, PARAM), is_aligned(g_at, n, GRAD),
                    tl.load(limits_ptr), tl.load(limits_ptr + 1), tl.load(limits_ptr + 2),
                    GRAD, GRAD.primitive_bitwidth // 8, PARAM, PARAM.primitive_bitwidth // 8,
                    2.0, False, PROPAGATES, UNIT_BYTES,
                )  # fmt: skip
                multiplier *= coef
                n_clipped += (coef != 1.0).to(tl.int32)  # NaN counts as clipped
                # Kept in memory to save registers. A thread that reads a new value does not change
                # it.
                old = tl.load(clipped_ptr)
                if (coef < old) | ((coef != coef) & (old == old)):  # keeps the first NaN
                    tl.store(clipped_ptr, coef)
                    tl.store(clipped_ptr + 2, tensor.to(tl.float64))
                    tl.store(clipped_ptr + 3, (first // limited).to(tl.float64))
        a_at = array_at(address_ptr, STATE, first, A)
        b_at = array_at(address_ptr, STATE + 1, first, B)
        c_at = array_at(address_ptr, STATE + 2, first, C)
        x_at = array_at(address_ptr, MASTER, first, X)
        counter = tl.load(tensors_ptr + TENSOR_COLUMNS * tensor + COUNTER_COLUMN) + first
        counter = counter.to(tl.uint32)
        coef_ptr = coefficients_ptr + COEFFICIENT_COLUMNS * tensor
        key = tl.load(coef_ptr + KEY_COLUMN).to(tl.int64).to(tl.uint32)
        c0, c1, c2, c3, c4, c5, c6, c7 = coefficients_at(coef_ptr, ARITHMETIC)
        threshold = tl.load(coef_ptr + SPIKE_COLUMN).to(ARITHMETIC) if SPIKES else c0
        reset = tl.load(coef_ptr + RESET_COLUMN) != 0.0 if SPIKES else clean
        scale, factor = factors_of(multiplier, coef_ptr, ARITHMETIC)

        # These hints hold only for whole vectors. Inside a function, inlining would lose the hints.
        p_ptr = tl.multiple_of(p_at.to(tl.pointer_type(PARAM)), VEC * PARAM.primitive_bitwidth // 8)
        g_ptr = tl.multiple_of(g_at.to(tl.pointer_type(GRAD)), VEC * GRAD.primitive_bitwidth // 8)
        a_ptr = tl.multiple_of(a_at.to(tl.pointer_type(A)), VEC * A.primitive_bitwidth // 8)
        b_ptr = tl.multiple_of(b_at.to(tl.pointer_type(B)), VEC * B.primitive_bitwidth // 8)
        c_ptr = tl.multiple_of(c_at.to(tl.pointer_type(C)), VEC * C.primitive_bitwidth // 8)
        x_ptr = tl.multiple_of(x_at.to(tl.pointer_type(X)), VEC * X.primitive_bitwidth // 8)
        squares, changes = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
        bad = tl.zeros((LANES,), tl.int32)
        i = 0
        while i < n_vec:
            at = i + tl.arange(0, BLOCK_SIZE)
            p_old, p_new, p_stored = update_elements(
                p_ptr, g_ptr, a_ptr, b_ptr, c_ptr, x_ptr,
                at, at < n_vec, counter, key, clean, scale, factor, threshold, reset,
                c0, c1, c2, c3, c4, c5, c6, c7,
                PARAM, A, B, C, ALGORITHM, N_STATES, MASTER_KIND, STOCHASTIC, AMSGRAD, NESTEROV,
                REPRODUCIBLE, SPIKES, EXACT_BF16, ARITHMETIC,
            )  # fmt: skip
            if STATISTICS:
                x, y, z = statistics_of(p_old, p_new, p_stored, at < n_vec, VEC, BLOCK_SIZE)
                squares, changes, bad = squares + x, changes + y, bad + z
            i += BLOCK_SIZE
        p_ptr = p_at.to(tl.pointer_type(PARAM))
        g_ptr = g_at.to(tl.pointer_type(GRAD))
        a_ptr = a_at.to(tl.pointer_type(A))
        b_ptr = b_at.to(tl.pointer_type(B))
        c_ptr = c_at.to(tl.pointer_type(C))
        x_ptr = x_at.to(tl.pointer_type(X))
        i = n_vec
        while i < n:
            at = i + tl.arange(0, SLOW_SIZE)
            p_old, p_new, p_stored = update_elements(
                p_ptr, g_ptr, a_ptr, b_ptr, c_ptr, x_ptr,
                at, at < n, counter, key, clean, scale, factor, threshold, reset,
                c0, c1, c2, c3, c4, c5, c6, c7,
                PARAM, A, B, C, ALGORITHM, N_STATES, MASTER_KIND, STOCHASTIC, AMSGRAD, NESTEROV,
                REPRODUCIBLE, SPIKES, EXACT_BF16, ARITHMETIC,
            )  # fmt: skip
            if STATISTICS:
                x, y, z = statistics_of(p_old, p_new, p_stored, at < n, 1, SLOW_SIZE)
                squares, changes, bad = squares + x, changes + y, bad + z
            i += SLOW_SIZE
        if STATISTICS:
            all_squares = tl.sum(squares, axis=0)
            all_changes = tl.sum(changes, axis=0)
            all_bad = tl.sum(bad, axis=0)
            if UNITS:
                all_squares += done_squares
                all_changes += done_changes
                all_bad += done_bad
                ends = done + n >= in_chunk
                done_squares = tl.where(ends, 0.0, all_squares)
                done_changes = tl.where(ends, 0.0, all_changes)
                done_bad = tl.where(ends, 0, all_bad)
            partial_ptr = partials_ptr + (n_chunks - 1 - k)
            tl.store(partial_ptr, all_squares)
            tl.store(partial_ptr + n_chunks, all_changes)
            tl.store(partial_ptr + 2 * n_chunks, all_bad.to(tl.float64))
        if UNITS:
            done += n
            ends = done >= in_chunk
            k = tl.where(ends, k + tl.num_programs(0), k)
            done = tl.where(ends, 0, done)
        else:
            k += tl.num_programs(0)
    if UNITS:
        tl.store(clipped_ptr + 1, n_clipped.to(tl.float64))
