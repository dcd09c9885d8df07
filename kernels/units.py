"""Adaptive gradient clipping: norms of rows of gradients and weights, and the rows scaled.

    coef[u] = limit / norm(g[u]) where norm(g[u]) > limit = clip_factor * max(norm(w[u]), eps)
    g[u]   <- coef[u] * g[u]

A unit u is a row of one tensor. Launch 1 reads 2N bytes and writes 8 bytes per unit; launch 2 reads
these 8 bytes per unit, then reads and writes the rows whose coefficient is not 1.

The grid is persistent: program k walks units k, k + P, k + 2P, ... Their numbers only grow, so that
it finds the tensor of a unit by going on from that of the last one in a table with one row per
tensor; no table has a row per unit (a model of 8 billion parameters has 1.5 million). Launch 2
walks backwards, because what launch 1 read last is still in the L2 cache. A program reads one unit
at a time: a model that is one long vector is read by one program.

Numerics: power sums in float64; of squares of fp16 and bf16, two neighbours are added in float32
before (3e-8 of the norm at most, see `measure`). A row whose sum is
infinite or NaN is read again, divided by its largest finite element. No atomics.

Loads are 128 bits wide where every row of a tensor begins on 16 bytes, else one element wide, yet
neighbours: rows of 147 elements (the first convolution of a ResNet) cannot be aligned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.apply import SMALLEST_FACTOR, factors
from fastguard.kernels.chunk_layout import ALIGNMENT
from fastguard.kernels.chunks import Bucket, is_dense
from fastguard.kernels.elements import TRITON_DTYPES, powers, root, unit_of, vector_powers, widened
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.tuning import PLAIN_NORMS, Tuning, n_programs
from fastguard.kernels.upload import Upload, upload

COLUMNS = 5  # of a tensor in the table
FIRST_UNIT = tl.constexpr(3)
WIDTH = tl.constexpr(COLUMNS)
# 128 threads with two 16-byte loads each in flight; short blocks, because rows are short.
PLAIN = Tuning(block_bytes=4096, num_warps=4, programs=4, max_registers=128)
# Logarithms and exponentials want registers; see `tuning`.
ANY_POWER = Tuning(block_bytes=2048, num_warps=4, programs=3, max_registers=168)
TABLES = 8  # kept: sets of None gradients and allocators alternate
KEY = -1  # in the memo of a bucket, beside the chunk tables by number of segments


class Units(Protocol):
    """What a table is made of; see `fastguard.gradients.unit_buckets.UnitBucket`."""

    @property
    def bucket(self) -> Bucket: ...
    @property
    def weights(self) -> list[Tensor]: ...
    @property
    def counts(self) -> list[int]: ...


@triton.jit
def row_power_sum(
    address, n, aligned, DTYPE: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, VEC: tl.constexpr
):
    """float64: the sum of |x|^P of one row; NaN or Inf where an element is."""
    GROUP: tl.constexpr = 2 if VEC == 8 and P == 2.0 else 1
    offsets = tl.arange(0, SIZE)
    total = tl.zeros((SIZE // VEC,), tl.float64)
    i = n - n  # 0 of the type of n
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
    """The norm of the finite elements of a row, and whether an element is NaN, and infinite."""
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
        finite = x < INF  # NaN is not
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
    """See `exact_row`."""
    SIZE: tl.constexpr = BLOCK_BYTES // ITEM_SIZE
    VEC: tl.constexpr = 16 // ITEM_SIZE
    if INF_NORM:
        return exact_row(address, n, DTYPE, P, True, SIZE)
    else:
        total = row_power_sum(address, n, aligned, DTYPE, P, SIZE, VEC)
        norm = root(total, P, False)
        nan = tl.full((), 0, tl.int32)
        infinite = tl.full((), 0, tl.int32)
        if (total < float("inf")) == 0:  # NaN is not
            norm, nan, infinite = exact_row(address, n, DTYPE, P, False, SIZE)
        return norm, nan, infinite


@triton.jit(
    do_not_specialize=["tensors_ptr", "limits_ptr", "coefs_ptr", "inv_scale_ptr", "n_units"]
)
def unit_coefs_kernel(
    tensors_ptr,  # int64 (n_tensors + 1, 5): see `UnitTable`
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
    INF: tl.constexpr = float("inf")
    clip_factor = tl.load(limits_ptr)
    eps = tl.load(limits_ptr + 1)
    tensor_ptr = tensors_ptr
    unit = tl.program_id(0)
    while unit < n_units:
        while unit >= tl.load(tensor_ptr + WIDTH + FIRST_UNIT):
            tensor_ptr += WIDTH
        n = tl.load(tensor_ptr + 2)
        start = (unit - tl.load(tensor_ptr + FIRST_UNIT)) * n
        aligned = tl.load(tensor_ptr + 4)
        w_address = tl.load(tensor_ptr + 1) + start * WEIGHT_SIZE
        w_norm, w_nan, w_infinite = row_norm(
            w_address, n, aligned & 2, WEIGHT, P, INF_NORM, BLOCK_BYTES, WEIGHT_SIZE
        )
        limit = clip_factor * tl.maximum(w_norm, eps)
        limit = tl.where((w_nan | w_infinite) != 0, INF, limit)  # such weights limit nothing
        g_address = tl.load(tensor_ptr) + start * GRAD_SIZE
        norm, nan, infinite = row_norm(
            g_address, n, aligned & 1, GRAD, P, INF_NORM, BLOCK_BYTES, GRAD_SIZE
        )
        if HAS_SCALE:
            norm = norm * tl.load(inv_scale_ptr).to(tl.float64)
        coef = tl.where(norm > limit, limit / norm, 1.0)
        if PROPAGATES:
            coef = tl.where((infinite != 0) & (limit < INF), 0.0, coef)
            coef = tl.where(nan != 0, float("nan"), coef)
        tl.store(coefs_ptr + unit, coef)
        unit += tl.num_programs(0)


@triton.jit(do_not_specialize=["tensors_ptr", "coefs_ptr", "n_units", "n_tensors"])
def scale_units_kernel(
    tensors_ptr,  # int64 (n_tensors + 1, 5): see `UnitTable`
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
    tensor_ptr = tensors_ptr + WIDTH * (n_tensors - 1)
    unit = n_units - 1 - tl.program_id(0)
    while unit >= 0:
        exact = tl.load(coefs_ptr + unit)
        if exact != 1.0:  # true for NaN
            while unit < tl.load(tensor_ptr + FIRST_UNIT):
                tensor_ptr -= WIDTH
            n = tl.load(tensor_ptr + 2)
            start = (unit - tl.load(tensor_ptr + FIRST_UNIT)) * n
            address = tl.load(tensor_ptr) + start * ITEM_SIZE
            tiny = (exact > 0.0) & (exact < SMALLEST_FACTOR)
            first = tl.where(tiny, SMALLEST_FACTOR, 1.0).to(FACTOR)
            factor = tl.where(tiny, exact / SMALLEST_FACTOR, exact).to(FACTOR)
            i = n - n
            if tl.load(tensor_ptr + 4) & 1:
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


@dataclass(slots=True, eq=False)
class UnitTable:
    """Where the units of one bucket lie.

    Attributes:
        upload: Its memory.
        tensors: int64 `((T + 1) * 5,)`: of each tensor that has elements the addresses of gradient
            and weight, the elements of a row, its first unit, and which rows are aligned (1 for the
            gradient, 2 for the weight); last, only the number of all units in the fourth column.
        limits: float64 `(2,)`: clip_factor and eps.
        n_tensors: T.
        n_units: U.
        grad_copies, weight_copies: `(position, contiguous buffer)` of those whose rows are no
            blocks of memory.
        key: What the table was built from.
    """

    upload: Upload
    tensors: Tensor
    limits: Tensor
    n_tensors: int
    n_units: int
    grad_copies: tuple[tuple[int, Tensor], ...]
    weight_copies: tuple[tuple[int, Tensor], ...]
    key: tuple[object, ...]


_tables: dict[torch.device, tuple[UnitTable, ...]] = {}  # tuples are replaced, never changed


def unit_table(units: Units, limits: tuple[float, ...] | None = None) -> UnitTable:
    """The table of a bucket, from the cache if nothing has moved. Waits for nothing.

    Args:
        units: The gradients and weights.
        limits: clip_factor and eps; None: those of the last call for this bucket.
    """
    kept = units.bucket.memo.tables.get(KEY)
    if kept is not None and limits is None:
        return kept
    device = units.bucket.device
    key = (limits, units.counts, _places(units.bucket.grads), _places(units.weights))
    table = next((t for t in _tables.get(device, ()) if t.key == key), None)
    if table is None:
        table = _built(units, limits or (1.0, 1.0), key)
        if table.upload.is_lasting:
            _tables[device] = (table, *_tables.get(device, ())[: TABLES - 1])
    units.bucket.memo.tables[KEY] = table
    table.upload.await_on_stream()
    return table


def _places(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return (
        [t.dtype for t in tensors[:1]],
        list(map(Tensor.data_ptr, tensors)),
        [tuple(t.shape) for t in tensors],
        [t.stride() for t in tensors],
    )


def _built(units: Units, limits: tuple[float, ...], key: tuple[object, ...]) -> UnitTable:
    grads, grad_copies = _in_rows(units.bucket.grads, units.counts)
    weights, weight_copies = _in_rows(units.weights, units.counts)
    rows = []
    first = 0
    for grad, weight, n in zip(grads, weights, units.counts, strict=True):
        if n:
            row = grad.numel() // n
            aligned = _aligned(grad, row) + 2 * _aligned(weight, row)
            rows.append([grad.data_ptr(), weight.data_ptr(), row, first, aligned])
            first += n
    rows.append([0, 0, 0, first, 0])
    table = np.array(rows, dtype=np.int64).ravel()
    numbers = np.concatenate([table, np.array(limits, dtype=np.float64).view(np.int64)])
    buffers = tuple(buffer for _, buffer in (*grad_copies, *weight_copies))
    uploaded = upload(numbers, units.bucket.device, buffers)
    return UnitTable(
        upload=uploaded,
        tensors=uploaded.memory[: table.size],
        limits=uploaded.memory[table.size :].view(torch.float64),
        n_tensors=len(rows) - 1,
        n_units=first,
        grad_copies=grad_copies,
        weight_copies=weight_copies,
        key=key,
    )


def _aligned(t: Tensor, row: int) -> bool:
    """Whether every row begins and ends on 16 bytes."""
    return (t.data_ptr() | row * t.element_size()) % ALIGNMENT == 0


def _in_rows(
    tensors: Sequence[Tensor], counts: Sequence[int]
) -> tuple[list[Tensor], tuple[tuple[int, Tensor], ...]]:
    """The tensors, with a contiguous buffer in place of each whose rows are no blocks of memory."""
    copies = {
        i: torch.empty_like(t, memory_format=torch.contiguous_format)
        for i, (t, n) in enumerate(zip(tensors, counts, strict=True))
        if n and not _has_rows(t, n)
    }
    return [copies.get(i, t) for i, t in enumerate(tensors)], tuple(copies.items())


def _has_rows(t: Tensor, n: int) -> bool:
    """Whether the n rows are blocks of memory, one behind the other."""
    if t.is_contiguous():
        return True
    return is_dense(t) and (n == 1 or t.stride(0) == t.numel() // n)


def unit_coefs(
    table: UnitTable,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None,
) -> Tensor:
    """The coefficient of each unit, float64 `(U,)`.

    Args:
        table: Of the gradients and weights.
        device: Theirs.
        dtypes: Of the gradients, and of the weights.
        norm_type: p > 0, or `inf`.
        propagates: See `fastguard.stages.reference_units.unit_coefs`.
        inv_scale: A float tensor of one element.
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
    """`scale_dtype` is no constant of the kernel, but the type of an argument."""
    constants = coefs_constants(dtypes, norm_type, propagates, scale_dtype)
    return coefs_launcher(norm_type).variant(device, **constants)


def coefs_launcher(norm_type: float) -> Launcher:
    """The launcher of the kernel for a kind of norm."""
    return _coefs if norm_type in PLAIN_NORMS else _coefs_of_any_power


def coefs_constants(
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_type: float,
    propagates: bool,
    scale_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The constants of the kernel, and the type of its argument for the loss scale."""
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
