"""The watching stage: nonzero elements, the checksum of all bits, and the exponents of a sample.

    found[s] = nonzero elements of segment s        found[S] = sum over all elements of their bits
    counts[f] = sampled elements with exponent field f as float32          counts[256] = zeros

I/O: `bits_kernel` reads N bytes once, for either result or both; `exponents_kernel` reads every
`stride`-th element of each tensor. Both write with integer atomics, whose order does not matter, so
every run gives the same bits, which equal the results of `fastguard.stages.reference_watch`. Both
walk the chunk table of `measure`, and run only in the steps that are watched.

Numerics: the kernels use only integers, so dtypes of the same size share a kernel. An element is
read as a signed integer; an element of 64 bits is read as two integers of 32 bits. Sums wrap around
mod 2^32. A zero is an element whose bits are all 0 except for the sign.

`exponents_kernel` uses narrow loads: neighboring samples are `stride` elements apart, and usually
in different sectors. 2^18 samples in sectors of 32 bytes are 8 MB, independent of the size of the
model.

| the main loop of `bits_kernel` [sass, sm_90] | registers | loads in flight | instructions / 16 B |
|----------------------------------------------|-----------|-----------------|---------------------|
| fp32, checksum                               | 40        | 4               | 9.2                 |
| fp32, nonzero elements                       | 42        | 4               | 19.2                |
| fp32, both                                   | 48        | 4               | 21.2                |
| bf16, checksum                               | 40        | 4               | 21.5                |
| bf16, both                                   | 53        | 4               | 68.5                |
| fp64, both                                   | 50        | 4               | 17.2                |

An H100 reads at the speed of its memory with up to about 99 instructions per 16 bytes [der].
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.chunk_address import chunk_at, part_of_piece
from fastguard.kernels.chunks import ChunkTable
from fastguard.kernels.columns import (
    CHUNK_COLUMNS,
    FIRST_BYTE,
    FIRST_PIECE,
    PIECE_COLUMNS,
    PIECE_ELEMENTS,
    PIECE_FIRST_BYTE,
    PIECES,
    SEGMENT,
)
from fastguard.kernels.elements import TRITON_DTYPES, float32_of
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.tuning import PLAIN, n_programs

EXPONENTS = 257
ZEROS = tl.constexpr(256)  # index of the number of zeros, after the exponent fields
SAMPLES = 128  # samples per program and loop iteration
INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _words(bits):
    """Returns the bits of each element as an integer, mod 2^32; the sum of both halves of 64."""
    if bits.dtype == tl.int64:
        return bits.to(tl.int32) + (bits >> 32).to(tl.int32)
    else:
        return bits.to(tl.int32)


@triton.jit
def _is_nonzero(bits):
    """Returns 1 for each element that is neither 0 nor -0, else 0."""
    return ((bits << 1) != 0).to(tl.int32)


@triton.jit(
    do_not_specialize=["addresses_ptr", "chunks_ptr", "found_ptr", "n_chunks", "n_segments"]
)
def bits_kernel(
    addresses_ptr,  # int64 (n_stretches,): see `chunks`
    chunks_ptr,  # int64 (n_chunks, CHUNK_COLUMNS)
    found_ptr,  # int64 (n_segments + 1,), zero
    n_chunks,
    n_segments,
    BITS: tl.constexpr,  # the integer type with the size of an element
    NONZERO: tl.constexpr,
    CHECKSUM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VEC: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK_SIZE // VEC
    n_programs = tl.num_programs(0)
    offsets = tl.arange(0, BLOCK_SIZE)
    tail_offsets = tl.arange(0, VEC)
    words = tl.zeros((LANES,), dtype=tl.int32)
    tail_words = tl.zeros((VEC,), dtype=tl.int32)
    chunk = tl.program_id(0)
    next_address, next_n = chunk_at(addresses_ptr, chunks_ptr, chunk)
    while chunk < n_chunks:
        address, n = next_address, next_n
        # Prefetches the next row while this chunk is read. After the last chunk, the row is not
        # used.
        ahead = tl.minimum(chunk + n_programs, n_chunks - 1)
        next_address, next_n = chunk_at(addresses_ptr, chunks_ptr, ahead)
        # The hint holds only for whole vectors; an unaligned chunk has none (n_vec = 0).
        x_ptr = tl.multiple_of(address.to(tl.pointer_type(BITS)), 16)
        n_vec = (n // VEC) * VEC  # a mask that ends at a whole vector keeps loads 128 bits wide
        count = tl.zeros((LANES,), dtype=tl.int32)
        i = 0
        while i < n_vec:
            mask = i + offsets < n_vec
            bits = tl.load(x_ptr + i + offsets, mask=mask, other=0)
            if CHECKSUM:
                words += tl.sum(tl.reshape(_words(bits), (LANES, VEC)), axis=1)
            if NONZERO:
                count += tl.sum(tl.reshape(_is_nonzero(bits), (LANES, VEC)), axis=1)
            i += BLOCK_SIZE
        tail_ptr = address.to(tl.pointer_type(BITS)) + n_vec + tail_offsets
        tail = tl.load(tail_ptr, mask=n_vec + tail_offsets < n, other=0)
        if CHECKSUM:
            tail_words += _words(tail)
        if NONZERO:
            total = tl.sum(count, axis=0) + tl.sum(_is_nonzero(tail), axis=0)
            segment = tl.load(chunks_ptr + CHUNK_COLUMNS * chunk + SEGMENT)
            tl.atomic_add(found_ptr + segment, total.to(tl.int64), sem="relaxed")
        chunk += n_programs
    if CHECKSUM:
        # Summed in int64, since the interpreter of triton 3.6 and older does not wrap sums around.
        total = tl.sum(words.to(tl.int64), axis=0) + tl.sum(tail_words.to(tl.int64), axis=0)
        tl.atomic_add(found_ptr + n_segments, total, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "addresses_ptr", "chunks_ptr", "pieces_ptr", "counts_ptr", "inv_scale_ptr", "n_chunks",
        "stride",
    ]
)  # fmt: skip
def exponents_kernel(
    addresses_ptr,
    chunks_ptr,
    pieces_ptr,
    counts_ptr,  # int64 (EXPONENTS,), zero
    inv_scale_ptr,
    n_chunks,
    stride,
    DTYPE: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    lanes = tl.arange(0, SAMPLES).to(tl.int64)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        address, n_elements = chunk_at(addresses_ptr, chunks_ptr, chunk)
        row_ptr = chunks_ptr + CHUNK_COLUMNS * chunk
        begin = tl.load(row_ptr + FIRST_BYTE)
        piece = tl.load(row_ptr + FIRST_PIECE)
        last = piece + tl.load(row_ptr + PIECES)
        while piece < last:
            start, n = part_of_piece(row_ptr, address, n_elements, pieces_ptr, piece, ITEM_SIZE)
            piece_ptr = pieces_ptr + PIECE_COLUMNS * piece
            # The position of this part in its tensor, and of its first sample in this part.
            offset = begin + (start - address) - tl.load(piece_ptr + PIECE_FIRST_BYTE)
            offset = offset // ITEM_SIZE
            first = (stride // 2) % tl.load(piece_ptr + PIECE_ELEMENTS)
            i = tl.where(
                first > offset, first - offset, (stride - (offset - first) % stride) % stride
            )
            x_ptr = start.to(tl.pointer_type(DTYPE))
            while i < n:
                at = i + lanes * stride
                mask = at < n
                x = float32_of(tl.load(x_ptr + at, mask=mask, other=0.0))
                if HAS_SCALE:
                    x *= tl.load(inv_scale_ptr).to(tl.float32)
                field = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
                place = tl.where(x == 0.0, ZEROS, field)
                tl.atomic_add(counts_ptr + place, 1, mask=mask, sem="relaxed")
                i += SAMPLES * stride
            piece += 1
        chunk += tl.num_programs(0)


_bits = Launcher(bits_kernel, PLAIN.num_warps, PLAIN.max_registers)
_exponents = Launcher(exponents_kernel, num_warps=SAMPLES // 32)


def read_bits(
    table: ChunkTable,
    device: torch.device,
    item_size: int,
    n_segments: int,
    nonzero: bool,
    checksum: bool,
) -> Tensor:
    """Reads the bit patterns of a table.

    Args:
        table: The chunk table.
        device: Device of the elements.
        item_size: Bytes per element: 2, 4 or 8.
        n_segments: S.
        nonzero, checksum: Which results are computed; results that are not computed are 0.

    Returns:
        int64 `(S + 1,)`: the number of nonzero elements of each segment, then the checksum, whose
        upper half is undefined.
    """
    found = torch.zeros(n_segments + 1, dtype=torch.int64, device=device)
    layout = table.layout
    if layout.n_chunks:
        grid = min(n_programs(device), layout.n_chunks)
        launch = _bits_variant(device, item_size, nonzero, checksum)
        tensors = (table.addresses, layout.chunks, found)
        launch(grid, tensors, layout.n_chunks, n_segments)
    return found


def bits_constants(item_size: int, nonzero: bool, checksum: bool) -> dict[str, object]:
    """Returns the constants of the kernel, in order."""
    return {
        "BITS": INTEGERS[item_size],
        "NONZERO": nonzero,
        "CHECKSUM": checksum,
        "BLOCK_SIZE": PLAIN.block_bytes // item_size,
        "VEC": 16 // item_size,
    }


@functools.lru_cache(maxsize=256)
def _bits_variant(device: torch.device, item_size: int, nonzero: bool, checksum: bool) -> Variant:
    return _bits.variant(device, **bits_constants(item_size, nonzero, checksum))


def count_exponents(
    table: ChunkTable,
    device: torch.device,
    dtype: torch.dtype,
    stride: int,
    inv_scale: Tensor | None,
) -> Tensor:
    """Counts the exponents of every `stride`-th element of each tensor of a table.

    Args:
        table: The chunk table.
        device, dtype: Device and dtype of the elements.
        stride: Distance of the samples, below 2^31.
        inv_scale: `()`: factor of the elements; None: 1.

    Returns:
        int64 `(EXPONENTS,)`.
    """
    counts = torch.zeros(EXPONENTS, dtype=torch.int64, device=device)
    layout = table.layout
    if layout.n_chunks:
        scale, scale_dtype = counts, None
        if inv_scale is not None:
            scale, scale_dtype = inv_scale.to(device, non_blocking=True), inv_scale.dtype
        launch = _exponents_variant(device, dtype, scale_dtype)
        grid = min(n_programs(device), layout.n_chunks)
        tensors = (table.addresses, layout.chunks, layout.pieces, counts, scale)
        launch(grid, tensors, layout.n_chunks, stride)
    return counts


def exponents_constants(dtype: torch.dtype, has_scale: bool) -> dict[str, object]:
    """Returns the constants of the kernel, in order."""
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ITEM_SIZE": dtype.itemsize,
        "HAS_SCALE": has_scale,
        "SAMPLES": SAMPLES,
    }


@functools.lru_cache(maxsize=256)
def _exponents_variant(
    device: torch.device, dtype: torch.dtype, scale_dtype: torch.dtype | None
) -> Variant:
    return _exponents.variant(device, **exponents_constants(dtype, scale_dtype is not None))
