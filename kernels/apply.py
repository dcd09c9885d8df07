"""Launch 3, apply: scales and cleans the gradients in place.

    g <- multiplier[segment of g] * (g if finite else 0 when cleaning)

I/O: one scalar per program if there is nothing to do; otherwise 2N bytes of the segments whose
multiplier is not 1. Cleaning with multiplier 1 reads N bytes and writes only blocks that contain
NaN or Inf.

With several segments, programs first read the verdict's `changes`, and return if there is nothing
to change. Otherwise each program would go through its rows of the table with two dependent loads
per row, about 13 µs for 5000 tensors [der].

The table is processed backwards, since the chunks that measure read last are still in the L2 cache.
The arithmetic is the same as for a multiplication in torch: in float32 (float64 for float64), with
one rounding of the product to the dtype. If a multiplier rounds to 1, nothing is written. A NaN or
Inf multiplier must be applied to all gradient elements, but not to the zeros between the gradients
of a flat bucket (0 * NaN is NaN), so the kernel then processes the pieces of a chunk one by one. It
also does so for multipliers that are too small for float32, which are applied in two steps.
Non-finite elements are replaced with a select, never with a multiplication by 0.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.chunk_address import chunk_at, part_of_piece
from fastguard.kernels.chunks import ChunkTable
from fastguard.kernels.columns import CHUNK_COLUMNS, FIRST_PIECE, PIECES, SEGMENT
from fastguard.kernels.elements import TRITON_DTYPES, float32_of
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.tuning import n_programs

BLOCK_BYTES = 16384  # 256 threads with four 16-byte loads each in flight
PIECE_SIZE = tl.constexpr(512)  # elements per block for NaN, Inf and tiny multipliers (rare)
# smaller factors are subnormal in float32 and need two products
SMALLEST_FACTOR = tl.constexpr(2.0**-100)


@triton.jit
def factors(x):
    """Converts elements to the dtype of the multiplication: float32, or float64 for float64."""
    if x.dtype == tl.float64:
        return x
    else:
        return float32_of(x)


@triton.jit
def scaled(x, multiplier, clean):
    """Cleans and multiplies a block of elements converted by `factors`."""
    if clean:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # this is False for NaN
    return x * multiplier


@triton.jit(
    do_not_specialize=[
        "addresses_ptr", "chunks_ptr", "pieces_ptr", "multiplier_ptr", "clean_ptr", "changes_ptr",
        "n_chunks",
    ]
)  # fmt: skip
def apply_kernel(
    addresses_ptr,  # int64 (n_stretches,): see `chunks`
    chunks_ptr,  # int64 (n_chunks, CHUNK_COLUMNS)
    pieces_ptr,  # int64 (n_pieces, PIECE_COLUMNS)
    multiplier_ptr,  # float64 (n_segments,)
    clean_ptr,  # (1,): nonzero to clean
    changes_ptr,  # float32 (1,): 0 if no segment changes
    n_chunks,
    DTYPE: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    ONE_SEGMENT: tl.constexpr,
    HAS_CHANGES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VEC: tl.constexpr,
):
    FACTOR: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    INF: tl.constexpr = float("inf")
    clean = tl.load(clean_ptr) != 0
    if ONE_SEGMENT:
        if (clean == 0) & (tl.load(multiplier_ptr).to(FACTOR) == 1.0):  # this is False for NaN
            return
    elif HAS_CHANGES:
        if tl.load(changes_ptr) == 0.0:
            return
    offsets = tl.arange(0, BLOCK_SIZE)
    tail_offsets = tl.arange(0, VEC)
    k = tl.program_id(0)
    while k < n_chunks:
        chunk = n_chunks - 1 - k
        row_ptr = chunks_ptr + CHUNK_COLUMNS * chunk
        exact = tl.load(multiplier_ptr + tl.load(row_ptr + SEGMENT))
        multiplier = exact.to(FACTOR)
        tiny = (exact > 0.0) & (exact < SMALLEST_FACTOR)
        unscaled = multiplier == 1.0
        if clean | (unscaled == 0):
            address, n = chunk_at(addresses_ptr, chunks_ptr, chunk)
            if (tl.abs(multiplier) < INF) & (tiny == 0):
                x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
                tail_ptr = address.to(tl.pointer_type(DTYPE))
                n_vec = (n // VEC) * VEC
                i = 0
                if clean:
                    while i < n_vec:
                        mask = i + offsets < n_vec
                        x = factors(tl.load(x_ptr + i + offsets, mask=mask, other=0.0))
                        y = scaled(x, multiplier, True)
                        # Writes the whole block or nothing, so that stores stay 128 bits wide.
                        finite = tl.min((tl.abs(x) < INF).to(tl.int32), axis=0)
                        if (unscaled == 0) | (finite == 0):
                            tl.store(x_ptr + i + offsets, y.to(DTYPE), mask=mask)
                        i += BLOCK_SIZE
                else:
                    while i < n_vec:
                        mask = i + offsets < n_vec
                        x = factors(tl.load(x_ptr + i + offsets, mask=mask, other=0.0))
                        tl.store(x_ptr + i + offsets, (x * multiplier).to(DTYPE), mask=mask)
                        i += BLOCK_SIZE
                if n_vec < n:
                    mask = n_vec + tail_offsets < n
                    x = factors(tl.load(tail_ptr + n_vec + tail_offsets, mask=mask, other=0.0))
                    y = scaled(x, multiplier, clean)
                    tl.store(tail_ptr + n_vec + tail_offsets, y.to(DTYPE), mask=mask)
            else:
                first = tl.where(tiny, SMALLEST_FACTOR, 1.0).to(FACTOR)
                multiplier = tl.where(tiny, exact / SMALLEST_FACTOR, exact).to(FACTOR)
                piece = tl.load(row_ptr + FIRST_PIECE)
                last = piece + tl.load(row_ptr + PIECES)
                while piece < last:
                    start, m = part_of_piece(row_ptr, address, n, pieces_ptr, piece, ITEM_SIZE)
                    piece_offsets = tl.arange(0, PIECE_SIZE)
                    p_ptr = start.to(tl.pointer_type(DTYPE))
                    i = 0
                    while i < m:
                        mask = i + piece_offsets < m
                        x = factors(tl.load(p_ptr + i + piece_offsets, mask=mask, other=0.0))
                        y = scaled(x, first, clean) * multiplier
                        tl.store(p_ptr + i + piece_offsets, y.to(DTYPE), mask=mask)
                        i += PIECE_SIZE
                    piece += 1
        k += tl.num_programs(0)


_apply = Launcher(apply_kernel, num_warps=8, max_registers=80)


def apply_chunks(
    table: ChunkTable,
    device: torch.device,
    dtype: torch.dtype,
    multiplier: Tensor,
    clean: Tensor,
    changes: Tensor | None = None,
) -> None:
    """Scales and cleans the gradients of a table in place.

    Args:
        table: The chunk table.
        device: Device of the gradients.
        dtype: Dtype of the gradients.
        multiplier: float64 `(S,)`, contiguous.
        clean: `()`, any real dtype, nonzero to clean.
        changes: float32 `()`, 0 if every multiplier is 1 and nothing is cleaned; None: unknown.
    """
    if not table.n_chunks:
        return
    one_segment = multiplier.numel() == 1
    # with one segment, the multiplier is sufficient
    known = changes is not None and not one_segment
    launch = _variant(device, dtype, one_segment, known, clean.dtype)
    layout = table.layout
    tensors = (
        table.addresses,
        layout.chunks,
        layout.pieces,
        multiplier,
        clean,
        changes if known else multiplier,
    )
    launch(min(n_programs(device), layout.n_chunks), tensors, layout.n_chunks)


@functools.cache
def _variant(
    device: torch.device,
    dtype: torch.dtype,
    one_segment: bool,
    has_changes: bool,
    clean_dtype: torch.dtype,
) -> Variant:
    """`clean_dtype` is not a constant of the kernel, but the type of an argument."""
    item = dtype.itemsize
    return _apply.variant(
        device,
        DTYPE=TRITON_DTYPES[dtype],
        ITEM_SIZE=item,
        ONE_SEGMENT=one_segment,
        HAS_CHANGES=has_changes,
        BLOCK_SIZE=BLOCK_BYTES // item,
        VEC=16 // item,
    )
