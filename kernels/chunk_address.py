"""Locates chunks and pieces of the chunk table, within kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.columns import (
    CHUNK_COLUMNS,
    ELEMENTS,
    FIRST_BYTE,
    PIECE_COLUMNS,
    PIECE_ELEMENTS,
    PIECE_FIRST_BYTE,
    STRETCH,
)


@triton.jit
def chunk_at(addresses_ptr, chunks_ptr, chunk):
    """Returns the address and the number of elements of a chunk."""
    row_ptr = chunks_ptr + CHUNK_COLUMNS * chunk
    stretch = tl.load(row_ptr + STRETCH)
    first = tl.load(row_ptr + FIRST_BYTE)
    n = tl.load(row_ptr + ELEMENTS).to(tl.int32)
    return tl.load(addresses_ptr + stretch) + first, n


@triton.jit
def part_of_piece(row_ptr, address, n_elements, pieces_ptr, piece, ITEM_SIZE: tl.constexpr):
    """Returns the address and the number of elements of the part of a piece that is in a chunk.

    The table gives the positions of the piece and of the chunk relative to their common stretch.
    """
    begin = tl.load(row_ptr + FIRST_BYTE)
    end = begin + n_elements.to(tl.int64) * ITEM_SIZE
    piece_ptr = pieces_ptr + PIECE_COLUMNS * piece
    piece_begin = tl.load(piece_ptr + PIECE_FIRST_BYTE)
    piece_end = piece_begin + tl.load(piece_ptr + PIECE_ELEMENTS) * ITEM_SIZE
    start = tl.maximum(piece_begin, begin)
    n = ((tl.minimum(piece_end, end) - start) // ITEM_SIZE).to(tl.int32)
    return address + (start - begin), n
