"""Adaptive gradient clipping: computes norms of rows of gradients and weights, and scales the rows.

    coef[u] = limit / norm(g[u]) if norm(g[u]) > limit = clip_factor * max(norm(w[u]), eps)
    g[u]   <- coef[u] * g[u]

A unit u is a row of one tensor. Launch 1 reads 2N bytes and writes 8 bytes per unit; launch 2 reads
these 8 bytes per unit, then reads and writes the rows whose coefficient is not 1.

The grid is persistent: program k processes units k, k + P, k + 2P, ... Since these numbers only
grow, the program finds the tensor of a unit by advancing from the tensor of the previous unit (see
`unit_table`). Launch 2 processes units in reverse order, since the rows that launch 1 read last are
still in the L2 cache. A program reads one unit at a time, so a model that is a single long vector
is read by a single program.

Numerics: power sums are float64; for squares of fp16 and bf16, two neighbors are first added in
float32 (at most 3e-8 of the norm, see `measure`). A row whose sum is infinite or NaN is read again
and divided by its largest finite element. There are no atomics.

Loads are 128 bits wide if every row of a tensor begins at a multiple of 16 bytes. Otherwise, each
thread loads single elements next to the elements of neighboring threads: rows of 147 elements (the
first convolution of a ResNet) cannot be aligned.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.apply import SMALLEST_FACTOR, factors
from fastguard.kernels.columns import (
    ALIGNED,
    FIRST_UNIT,
    GRAD_ADDRESS,
    ROW_SIZE,
    UNIT_COLUMNS,
    WEIGHT_ADDRESS,
)
from fastguard.kernels.elements import TRITON_DTYPES, powers, root, unit_of, vector_powers, widened
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.tuning import PLAIN_NORMS, Tuning, n_programs
from fastguard.kernels.unit_table import UnitTable

# 128 threads with two 16-byte loads in flight each; short blocks, since rows are short.
PLAIN = Tuning(block_bytes=4096, num_warps=4, programs=4, max_registers=128)
# Logarithms and exponentials need registers; see `tuning`.
ANY_POWER = Tuning(block_bytes=2048, num_warps=4, programs=3, max_registers=168)


@triton.jit
def row_power_sum(
    address, n, aligned, DTYPE: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, VEC: tl.constexpr
):
    """Returns the sum of |x|^P of a row, float64; NaN or Inf if any element is."""
    GROUP: tl.constexpr = 2 if VEC == 8 and P == 2.0 else 1
    offsets = tl.arange(0, SIZE)
    total = tl.zeros((SIZE // VEC,), tl.float64)
    i = n - n  # gives 0 in the type of n
    if aligned:
        x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        while i < n:
            left = (tl.minimum(n - i, SIZE).to(tl.int32) // VEC) * VEC  # whole vectors
            x = tl.load(x_ptr + i + offsets, mask=offsets < left, other=0.0)
            total += vector_powers(x, P, GROUP, SIZE, VEC)
            i += SIZE
    else:
        lone_ptr = address.to(tl.pointer_type(DTYPE))
        while i < n:
            left = tl.minimum(n - i, SIZE).to(tl.int32)
            x = tl.load(lone_ptr + i + offsets, mask=offsets < left, other=0.0)
            total += vector_powers(x, P, GROUP, SIZE, VEC)
            i += SIZE
    return tl.sum(total, axis=0)


@triton.jit
def exact_row(
    address, n, DTYPE: tl.constexpr, P: tl.constexpr, INF_NORM: tl.constexpr, SIZE: tl.constexpr
):
    """Returns the norm of the finite elements of a row, and whether it has any NaN, and any Inf."""
    INF: tl.constexpr = float("inf")
    offsets = tl.arange(0, SIZE)
    x_ptr = address.to(tl.pointer_type(DTYPE))
    largest = tl.full((), 0.0, tl.float64)
    nan = tl.full((), 0, tl.int32)
    infinite = tl.full((), 0, tl.int32)
    i = n - n
    while i < n:
        left = tl.minimum(n - i, SIZE).to(tl.int32)
        x = tl.abs(widened(tl.load(x_ptr + i + offsets, mask=offsets < left, other=0.0)))
        finite = x < INF  # the comparison is False for NaN
        largest = tl.maximum(largest, tl.max(tl.where(finite, x, 0.0), axis=0))
        nan = tl.maximum(nan, tl.max((x != x).to(tl.int32), axis=0))
        infinite = tl.maximum(infinite, tl.max((x == INF).to(tl.int32), axis=0))
        i += SIZE
    norm = largest
    if not INF_NORM:
        unit = unit_of(largest)
        total = tl.full((), 0.0, tl.float64)
        i = n - n
        while i < n:
            left = tl.minimum(n - i, SIZE).to(tl.int32)
            x = tl.abs(widened(tl.load(x_ptr + i + offsets, mask=offsets < left, other=0.0)))
            x = tl.where(x < INF, x, 0.0) / unit
            total += tl.sum(powers(x, P), axis=0)
            i += SIZE
        norm = root(total, P, False) * unit
    return norm, nan, infinite


@triton.jit
def row_norm(
    address,
    n,
    aligned,
    DTYPE: tl.constexpr,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
):
    """Returns the results of `exact_row`; for most rows, they are computed by `row_power_sum`."""
    SIZE: tl.constexpr = BLOCK_BYTES // ITEM_SIZE
    VEC: tl.constexpr = 16 // ITEM_SIZE
    if INF_NORM:
        return exact_row(address, n, DTYPE, P, True, SIZE)
    else:
        total = row_power_sum(address, n, aligned, DTYPE, P, SIZE, VEC)
        norm = root(total, P, False)
        nan = tl.full((), 0, tl.int32)
        infinite = tl.full((), 0, tl.int32)
        if (total < float("inf")) == 0:  # the condition is also true for NaN
            norm, nan, infinite = exact_row(address, n, DTYPE, P, False, SIZE)
        return norm, nan, infinite


@triton.jit
def unit_coef(
    w_address, g_address, n, w_aligned, g_aligned, clip_factor, eps, inv_scale,
    GRAD: tl.constexpr, GRAD_SIZE: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT_SIZE: tl.constexpr,
    P: tl.constexpr, INF_NORM: tl.constexpr, PROPAGATES: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Returns the coefficient of a unit of n elements, float64; `inv_scale` unscales gradients."""
    INF: tl.constexpr = float("inf")
    w_norm, w_nan, w_infinite = row_norm(
        w_address, n, w_aligned, WEIGHT, P, INF_NORM, BLOCK_BYTES, WEIGHT_SIZE
    )
    limit = clip_factor * tl.maximum(w_norm, eps)
    limit = tl.where((w_nan | w_infinite) != 0, INF, limit)  # no limit for non-finite weights
    norm, nan, infinite = row_norm(
        g_address, n, g_aligned, GRAD, P, INF_NORM, BLOCK_BYTES, GRAD_SIZE
    )
    norm = norm * inv_scale
    coef = tl.where(norm > limit, limit / norm, 1.0)
    if PROPAGATES:
        coef = tl.where((infinite != 0) & (limit < INF), 0.0, coef)
        coef = tl.where(nan != 0, float("nan"), coef)
    return coef


@triton.jit(
    do_not_specialize=["tensors_ptr", "limits_ptr", "coefs_ptr", "inv_scale_ptr", "n_units"]
)
def unit_coefs_kernel(
    tensors_ptr,  # int64 (n_tensors + 1, UNIT_COLUMNS)
    limits_ptr,  # float64 (2,): clip_factor, eps
    coefs_ptr,  # float64 (n_units,)
    inv_scale_ptr,
    n_units,
    GRAD: tl.constexpr,
    GRAD_SIZE: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_SIZE: tl.constexpr,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    PROPAGATES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    clip_factor = tl.load(limits_ptr)
    eps = tl.load(limits_ptr + 1)
    inv_scale = tl.load(inv_scale_ptr).to(tl.float64) if HAS_SCALE else 1.0
    tensor_ptr = tensors_ptr
    unit = tl.program_id(0)
    while unit < n_units:
        while unit >= tl.load(tensor_ptr + UNIT_COLUMNS + FIRST_UNIT):
            tensor_ptr += UNIT_COLUMNS
        n = tl.load(tensor_ptr + ROW_SIZE)
        start = (unit - tl.load(tensor_ptr + FIRST_UNIT)) * n
        aligned = tl.load(tensor_ptr + ALIGNED)
        w_address = tl.load(tensor_ptr + WEIGHT_ADDRESS) + start * WEIGHT_SIZE
        g_address = tl.load(tensor_ptr + GRAD_ADDRESS) + start * GRAD_SIZE
        coef = unit_coef(
            w_address, g_address, n, aligned & 2, aligned & 1, clip_factor, eps, inv_scale,
            GRAD, GRAD_SIZE, WEIGHT, WEIGHT_SIZE, P, INF_NORM, PROPAGATES, BLOCK_BYTES,
        )  # fmt: skip
        tl.store(coefs_ptr + unit, coef)
        unit += tl.num_programs(0)


@triton.jit(do_not_specialize=["tensors_ptr", "coefs_ptr", "n_units", "n_tensors"])
def scale_units_kernel(
    tensors_ptr,  # int64 (n_tensors + 1, UNIT_COLUMNS)
    coefs_ptr,  # float64 (n_units,)
    n_units,
    n_tensors,
    DTYPE: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    FACTOR: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    SIZE: tl.constexpr = BLOCK_BYTES // ITEM_SIZE
    VEC: tl.constexpr = 16 // ITEM_SIZE
    offsets = tl.arange(0, SIZE)
    tensor_ptr = tensors_ptr + UNIT_COLUMNS * (n_tensors - 1)
    unit = n_units - 1 - tl.program_id(0)
    while unit >= 0:
        exact = tl.load(coefs_ptr + unit)
        if exact != 1.0:  # this is true for NaN
            while unit < tl.load(tensor_ptr + FIRST_UNIT):
                tensor_ptr -= UNIT_COLUMNS
            n = tl.load(tensor_ptr + ROW_SIZE)
            start = (unit - tl.load(tensor_ptr + FIRST_UNIT)) * n
            address = tl.load(tensor_ptr + GRAD_ADDRESS) + start * ITEM_SIZE
            tiny = (exact > 0.0) & (exact < SMALLEST_FACTOR)
            first = tl.where(tiny, SMALLEST_FACTOR, 1.0).to(FACTOR)
            factor = tl.where(tiny, exact / SMALLEST_FACTOR, exact).to(FACTOR)
            i = n - n
            if tl.load(tensor_ptr + ALIGNED) & 1:
                x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
                while i < n:
                    left = (tl.minimum(n - i, SIZE).to(tl.int32) // VEC) * VEC
                    x = tl.load(x_ptr + i + offsets, mask=offsets < left, other=0.0)
                    y = factors(x) * first * factor
                    tl.store(x_ptr + i + offsets, y.to(DTYPE), mask=offsets < left)
                    i += SIZE
            else:
                lone_ptr = address.to(tl.pointer_type(DTYPE))
                while i < n:
                    left = tl.minimum(n - i, SIZE).to(tl.int32)
                    x = tl.load(lone_ptr + i + offsets, mask=offsets < left, other=0.0)
                    y = factors(x) * first * factor
                    tl.store(lone_ptr + i + offsets, y.to(DTYPE), mask=offsets < left)
                    i += SIZE
        unit -= tl.num_programs(0)


_coefs = Launcher(unit_coefs_kernel, PLAIN.num_warps, PLAIN.max_registers)
_coefs_of_any_power = Launcher(unit_coefs_kernel, ANY_POWER.num_warps, ANY_POWER.max_registers)
_scale = Launcher(scale_units_kernel, PLAIN.num_warps, PLAIN.max_registers)


def unit_coefs(
    table: UnitTable,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None,
) -> Tensor:
    """Computes the coefficient of each unit.

    Args:
        table: The table of gradients and weights.
        device: Device of the tensors.
        dtypes: Dtype of the gradients, and of the weights.
        norm_type: p > 0, or `inf`.
        propagates: See `fastguard.stages.reference_units.unit_coefs`.
        inv_scale: A float tensor with one element; None: 1.

    Returns:
        float64 `(U,)`.
    """
    coefs = torch.empty(table.n_units, dtype=torch.float64, device=device)
    if table.n_units:
        scale_dtype = None if inv_scale is None else inv_scale.dtype
        launch = _coefs_variant(device, dtypes, norm_type, propagates, scale_dtype)
        tensors = (table.tensors, table.limits, coefs, coefs if inv_scale is None else inv_scale)
        tuning = PLAIN if norm_type in PLAIN_NORMS else ANY_POWER
        launch(min(n_programs(device, tuning), table.n_units), tensors, table.n_units)
    return coefs


@functools.cache
def _coefs_variant(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_type: float,
    propagates: bool,
    scale_dtype: torch.dtype | None,
) -> Variant:
    """`scale_dtype` is not a constant of the kernel, but the type of an argument."""
    constants = coefs_constants(dtypes, norm_type, propagates, scale_dtype)
    return coefs_launcher(norm_type).variant(device, **constants)


def coefs_launcher(norm_type: float) -> Launcher:
    """Returns the launcher for a norm."""
    return _coefs if norm_type in PLAIN_NORMS else _coefs_of_any_power


def coefs_constants(
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_type: float,
    propagates: bool,
    scale_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Returns the constants of the kernel, in order."""
    grad, weight = dtypes
    return {
        "GRAD": TRITON_DTYPES[grad],
        "GRAD_SIZE": grad.itemsize,
        "WEIGHT": TRITON_DTYPES[weight],
        "WEIGHT_SIZE": weight.itemsize,
        "P": 1.0 if norm_type == math.inf else norm_type,
        "INF_NORM": norm_type == math.inf,
        "PROPAGATES": propagates,
        "HAS_SCALE": scale_dtype is not None,
        "BLOCK_BYTES": (PLAIN if norm_type in PLAIN_NORMS else ANY_POWER).block_bytes,
    }


def scale_units(table: UnitTable, device: torch.device, dtype: torch.dtype, coefs: Tensor) -> None:
    """Scales the rows of the gradients in place.

    Args:
        table: The table of gradients and weights.
        device: Device of the gradients.
        dtype: Dtype of the gradients.
        coefs: float64 `(U,)`, contiguous.
    """
    if table.n_units:
        launch = _scale_variant(device, dtype)
        n = min(n_programs(device, PLAIN), table.n_units)
        launch(n, (table.tensors, coefs), table.n_units, table.n_tensors)


@functools.cache
def _scale_variant(device: torch.device, dtype: torch.dtype) -> Variant:
    return _scale.variant(
        device,
        DTYPE=TRITON_DTYPES[dtype],
        ITEM_SIZE=dtype.itemsize,
        BLOCK_BYTES=PLAIN.block_bytes,
    )
