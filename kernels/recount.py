"""The second pass of `measure` over a chunk: counts non-finite elements and sums finite ones.

I/O: reads the chunk once in float64, or twice if norms replace power sums. Counts are added with
integer atomics, whose order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.chunk_address import part_of_piece
from fastguard.kernels.columns import FIRST_PIECE, PIECE_COLUMNS, PIECE_TENSOR, PIECES
from fastguard.kernels.elements import powers, root, unit_of, widened

# The second pass is rare, so it uses small blocks to save registers.
RECOUNT_SIZE = tl.constexpr(512)


@triton.jit
def recount(
    address,
    n_elements,
    row_ptr,  # row of the chunk, see `chunks`
    pieces_ptr,
    counts_ptr,
    n_tensors,
    DTYPE: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,
):
    """Sums a chunk exactly, and adds to the counts of its tensors.

    Returns:
        The sum (maximum, norm) over the finite elements, and the numbers of NaN, +Inf and -Inf.
    """
    INF: tl.constexpr = float("inf")
    offsets = tl.arange(0, RECOUNT_SIZE)
    unit = tl.full((), 1.0, tl.float64)
    if ROOTED:
        largest = tl.zeros((RECOUNT_SIZE,), dtype=tl.float64)
        chunk_ptr = address.to(tl.pointer_type(DTYPE))
        i = 0
        while i < n_elements:
            mask = i + offsets < n_elements
            magnitude = tl.abs(widened(tl.load(chunk_ptr + i + offsets, mask=mask, other=0.0)))
            largest = tl.maximum(
                largest, tl.where(magnitude < INF, magnitude, 0.0)
            )  # False for NaN
            i += RECOUNT_SIZE
        unit = unit_of(tl.max(largest, axis=0))
    acc = tl.zeros((RECOUNT_SIZE,), dtype=tl.float64)
    chunk_nan = tl.full((), 0, tl.int64)
    chunk_posinf = tl.full((), 0, tl.int64)
    chunk_neginf = tl.full((), 0, tl.int64)
    piece = tl.load(row_ptr + FIRST_PIECE)
    last = piece + tl.load(row_ptr + PIECES)
    while piece < last:
        start, n = part_of_piece(row_ptr, address, n_elements, pieces_ptr, piece, ITEM_SIZE)
        tensor = tl.load(pieces_ptr + PIECE_COLUMNS * piece + PIECE_TENSOR)
        x_ptr = start.to(tl.pointer_type(DTYPE))
        # One register holds three 10-bit counts, since a lane reads MAX_CHUNK / RECOUNT_SIZE
        # elements.
        found = tl.zeros((RECOUNT_SIZE,), dtype=tl.int32)
        i = 0
        while i < n:
            x = widened(tl.load(x_ptr + i + offsets, mask=i + offsets < n, other=0.0))
            finite = tl.abs(x) < INF  # False for NaN
            value = tl.where(finite, x, 0.0)
            if INF_NORM:
                acc = tl.maximum(acc, tl.abs(value))
            elif ROOTED:
                acc += powers(value / unit, P)
            else:
                acc += powers(value, P)
            found += tl.where(finite, 0, tl.where(x != x, 1, tl.where(x > 0, 1 << 10, 1 << 20)))
            i += RECOUNT_SIZE
        n_nan = tl.sum(found & 1023, axis=0).to(tl.int64)
        n_posinf = tl.sum((found >> 10) & 1023, axis=0).to(tl.int64)
        n_neginf = tl.sum(found >> 20, axis=0).to(tl.int64)
        if n_nan + n_posinf + n_neginf > 0:
            tl.atomic_add(counts_ptr + tensor, n_nan, sem="relaxed")
            tl.atomic_add(counts_ptr + n_tensors + tensor, n_posinf, sem="relaxed")
            tl.atomic_add(counts_ptr + 2 * n_tensors + tensor, n_neginf, sem="relaxed")
        chunk_nan += n_nan
        chunk_posinf += n_posinf
        chunk_neginf += n_neginf
        piece += 1
    if INF_NORM:
        total = tl.max(acc, axis=0)
    else:
        total = tl.sum(acc, axis=0)
    if ROOTED:
        total = root(total, P, INF_NORM) * unit
    return total, chunk_nan, chunk_posinf, chunk_neginf
