"""Launch 1, measure: computes power sums and detects NaN and Inf in one read of the gradients.

    sum[s] = sum over the finite elements g of segment s of |g|^p        (inf-norm: the maximum)

I/O: reads N bytes once and writes 8 bytes per program (one segment) or per chunk (several). Chunks
that contain NaN or Inf are read a second time.

The grid is persistent: program k processes chunks k, k + P, k + 2P, ... of the table (see
`chunks`), in blocks of 128-bit loads. Partial sums are float64 and added in a fixed order, by the
last program to finish (one segment) or by a second small launch with one program per segment. The
same inputs and the same grid give bitwise the same sums. There are no floating-point atomics.

Numerics of p = 2. Squares in float64 are exact, but a GPU converts few numbers to float64 per clock
(16 per SM on sm_90, 2 on consumer cards). Therefore `GROUP` neighboring squares are added in
float32, and only their sum is converted. Squares of fp16 and bf16 are exact in float32; adding two
of them has a relative error of at most u = 2^-24, or u / 2 in the norm. If all squares of a 16-byte
vector are added in float32, the rounding errors of these additions (Knuth's TwoSum) and of float32
squares are summed separately, also in float32: they are at most 2^-10 of the sum, with 6 roundings
per vector and 16 for the blocks of a chunk.

| dtype      | GROUP | converted in 16 B | max. error of the norm     | for                    |
|------------|-------|-------------------|----------------------------|------------------------|
| fp64, fp32 | 1     | 0, 4              | as in float64 arithmetic   | any card               |
| fp16, bf16 | 2     | 4                 | 0.5 u = 3.0e-8             | any card               |
| fp32       | 4     | 1                 | 11 * 2^-34 = 6.4e-10       | fp64 at 1/32 or slower |
| fp16, bf16 | 8     | 1                 | less                       | fp64 at 1/32 or slower |

The bounds also hold for repeated values, for which all groups round the same way. Together with
rounding the norm to float32 (6.0e-8), the errors stay below 1e-7. Without summing the rounding
errors, sums of a whole vector would have an error of up to 8.9e-8, or 1.5e-7 including that
rounding; patterns of four and eight values reached these errors.

A grouped chunk is summed again in float64 if the range of float32 may not suffice: if its sum is
infinite (|x| > 9e18), or so small (below n * 2^-90) that squares below 2^-126 could matter. Small
sums are accepted if all elements are zero, which the largest bit pattern shows at one instruction
per element. fp16 squares lie in [2^-48, 2^32], so they are never summed again.

If power sums could overflow or underflow float64 (ROOTED: float64 gradients, or p > 6), chunks and
programs pass on norms instead. A chunk whose sum is infinite, or below n * 2^-960, is summed again
with elements divided by the largest one; norms are combined in the same way. The main loop does not
change.

Detecting NaN and Inf is free: any of them makes the sum of the chunk NaN or Inf (for the inf-norm,
the largest bit pattern). Only then is the chunk read again, in float64, tensor by tensor, and its
NaN, +Inf and -Inf are counted with integer atomics, whose order does not matter.

Lab table (sass: machine code for sm_90; `make kernels-test` prints the current numbers):

| only the main loop                           | registers | loads in flight | instructions / 16 B |
|----------------------------------------------|-----------|-----------------|---------------------|
| fp32, an fp64 accumulator per element [sass] | 62        | 4               | 16.2                |
| fp32, an fp64 accumulator per vector [sass]  | 32        | 4               | 17.2  (used)        |
| fp32, per vector, blocks doubled [sass]      | 62        | 8               | 17.1                |
| bf16, GROUP 1 [sass]                         | 40        | 4               | 27.2                |
| bf16, GROUP 2, OR of the bits [sass]         | 32        | 4               | 39.5                |

| the whole kernel, sums of whole vectors      | registers | loads in flight | instructions / 16 B |
|----------------------------------------------|-----------|-----------------|---------------------|
| fp32, bf16, without rounding errors [sass]   | 78, 74    | 4               | 15.8, 32.8          |
| fp32, bf16, with rounding errors [sass]      | 62, 62    | 4               | 54.2, 77.2  (used)  |

Cards with slow fp64 read 2 to 7 bytes per clock and SM [datasheets]. For these bytes, the kernel
issues at most 36 of the 128 instructions that an SM can issue per clock, so summing the rounding
errors should take no extra time.

The row of the next chunk is loaded before a chunk is read, which should save 0.3 µs per chunk,
mostly for tiny tensors [der]. It costs up to 16 of the 80 registers and no spill; the main loop
stays the same, except for at most 0.4 more instructions per 16 bytes for bf16 and 1.7 for p = 1
[sass]. Counts are kept in a persistent scratch (see `scratch`), which saves one launch per bucket,
and another 0.5 µs on the host (3.7 -> 3.2, without the launch).

The whole kernel with the second pass takes at most 80 registers. Without a limit, the compiler
spilled up to ten of them outside the loop to stay at 64 or 48 [sass]; limited to 80, it spills none
(one, outside the loop, for bf16 on sm_100 with triton 3.6). Reading the bits before the squares
takes 2.4 instructions less than after them [sass]. Powers other than 1 and 2 take 527 instructions
per 16 bytes. They spilled 41 times with 80 registers; with half a block, 8 times with 112 (triton
3.6) and never with 120; two programs per multiprocessor fit with either. fp16 and bf16 take 1040
instructions; with 168 registers, they spilled up to 35 times in half a block, and never in a
quarter [sass].
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels import scratch
from fastguard.kernels.chunk_address import chunk_at
from fastguard.kernels.chunks import ChunkTable
from fastguard.kernels.columns import CHUNK_COLUMNS, SEGMENT, SUMMARY_ROWS
from fastguard.kernels.elements import (
    TRITON_DTYPES,
    float32_of,
    magnitude_bits,
    norm_of_two,
    powers,
    root,
    vector_powers,
    vector_squares,
    widened,
)
from fastguard.kernels.launch import Launcher, Variant, wide_fp64
from fastguard.kernels.recount import recount
from fastguard.kernels.summary import (
    REDUCE_SIZE,
    move_counts,
    n_zeros,
    places,
    reduce_segments,
    store_summary,
    sum_of_partials,
    zero_counts,
)
from fastguard.kernels.tuning import Tuning, n_programs, tuning_of


@triton.jit(
    do_not_specialize=[
        "addresses_ptr", "chunks_ptr", "pieces_ptr", "scratch_ptr", "partials_ptr", "counts_ptr",
        "summary_ptr", "inv_scale_ptr", "n_chunks", "n_segments", "n_tensors",
    ]
)  # fmt: skip
def measure_kernel(
    addresses_ptr,  # int64 (n_stretches,): see `chunks`
    chunks_ptr,  # int64 (n_chunks, CHUNK_COLUMNS)
    pieces_ptr,  # int64 (n_pieces, PIECE_COLUMNS)
    scratch_ptr,  # int64, zero, see `summary`
    partials_ptr,  # float64 (n_programs,) if ONE_SEGMENT, else (n_chunks,)
    counts_ptr,  # int64 (3, n_tensors), written
    summary_ptr,  # float64 (4, n_segments)
    inv_scale_ptr,
    n_chunks,
    n_segments,
    n_tensors,
    DTYPE: tl.constexpr,
    ITEM_SIZE: tl.constexpr,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    # uses norms instead of power sums, which could exceed the range of float64
    ROOTED: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_SEGMENT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VEC: tl.constexpr,
    REDUCE_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,  # eviction policy of loads: "", "evict_first", "evict_last"
):
    LANES: tl.constexpr = BLOCK_SIZE // VEC
    WATCH_UNDERFLOW: tl.constexpr = GROUP > 1 and DTYPE != tl.float16
    KEEP_LOST: tl.constexpr = GROUP == VEC
    BITS: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    INF_BITS: tl.constexpr = 0x7FF0000000000000 if DTYPE == tl.float64 else 0x7F800000
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    tensor_counts_ptr, segment_counts_ptr, ticket_ptr = places(scratch_ptr, n_segments, n_tensors)
    offsets = tl.arange(0, BLOCK_SIZE)
    tail_offsets = tl.arange(0, VEC)
    mine = tl.full((), 0.0, tl.float64)
    if ONE_SEGMENT:
        zero_counts(counts_ptr, n_tensors, REDUCE_SIZE)

    chunk = program
    next_address, next_n = chunk_at(addresses_ptr, chunks_ptr, chunk)
    while chunk < n_chunks:
        address, n = next_address, next_n
        # Prefetches the next row while this chunk is read. After the last chunk, the row is not
        # used.
        ahead = tl.minimum(chunk + n_programs, n_chunks - 1)
        next_address, next_n = chunk_at(addresses_ptr, chunks_ptr, ahead)
        # The hint holds only for whole vectors; an unaligned chunk has none (n_vec = 0).
        x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        tail_ptr = address.to(tl.pointer_type(DTYPE))
        n_vec = (n // VEC) * VEC  # a mask that ends at a whole vector keeps loads 128 bits wide
        tail_mask = n_vec + tail_offsets < n

        if INF_NORM:
            largest = tl.zeros((LANES,), dtype=BITS)
            i = 0
            while i < n_vec:
                mask = i + offsets < n_vec
                x = tl.load(x_ptr + i + offsets, mask=mask, other=0.0, eviction_policy=EVICTION)
                bits = tl.reshape(magnitude_bits(x), (LANES, VEC))
                largest = tl.maximum(largest, tl.max(bits, axis=1))
                i += BLOCK_SIZE
            top = tl.max(largest, axis=0)
            if n_vec < n:
                x = tl.load(tail_ptr + n_vec + tail_offsets, mask=tail_mask, other=0.0)
                top = tl.maximum(top, tl.max(magnitude_bits(x), axis=0))
            trusted = top < INF_BITS
            if DTYPE == tl.float64:
                total = top.to(tl.float64, bitcast=True)
            else:
                total = top.to(tl.float32, bitcast=True).to(tl.float64)
        else:
            acc = tl.zeros((LANES,), dtype=tl.float64)
            lost = tl.zeros((LANES,), dtype=tl.float32)
            seen = tl.zeros((LANES,), dtype=tl.uint32)
            i = 0
            while i < n_vec:
                mask = i + offsets < n_vec
                x = tl.load(x_ptr + i + offsets, mask=mask, other=0.0, eviction_policy=EVICTION)
                if WATCH_UNDERFLOW:
                    bits = tl.reshape(float32_of(x).to(tl.uint32, bitcast=True), (LANES, VEC))
                    seen = tl.maximum(seen, tl.max(bits, axis=1))
                if KEEP_LOST:
                    squares, rounded_off = vector_squares(x, BLOCK_SIZE, VEC)
                    acc += squares.to(tl.float64)
                    lost += rounded_off
                else:
                    acc += vector_powers(x, P, GROUP, BLOCK_SIZE, VEC)
                i += BLOCK_SIZE
            total = tl.sum(acc, axis=0)
            if KEEP_LOST:
                total += tl.sum(lost.to(tl.float64), axis=0)
            trusted = tl.abs(total) < float("inf")  # the comparison is False for NaN
            if WATCH_UNDERFLOW:
                room = total >= n_vec.to(tl.float64) * 2.0**-90
                trusted = trusted & (room | (tl.max(seen, axis=0) == 0))
            if n_vec < n:
                x = tl.load(tail_ptr + n_vec + tail_offsets, mask=tail_mask, other=0.0)
                total += tl.sum(powers(widened(x), P), axis=0)
                trusted = trusted & (tl.abs(total) < float("inf"))
            if ROOTED:
                trusted = trusted & (total >= n.to(tl.float64) * 2.0**-960)

        if trusted == 0:
            row_ptr = chunks_ptr + CHUNK_COLUMNS * chunk
            segment = tl.load(row_ptr + SEGMENT)
            total, nan, posinf, neginf = recount(
                address, n, row_ptr, pieces_ptr, tensor_counts_ptr, n_tensors,
                DTYPE, ITEM_SIZE, P, INF_NORM, ROOTED,
            )  # fmt: skip
            if nan + posinf + neginf > 0:
                tl.atomic_add(segment_counts_ptr + segment, nan, sem="relaxed")
                tl.atomic_add(segment_counts_ptr + n_segments + segment, posinf, sem="relaxed")
                tl.atomic_add(segment_counts_ptr + 2 * n_segments + segment, neginf, sem="relaxed")
        else:
            if ROOTED:
                total = root(total, P, INF_NORM)

        if ONE_SEGMENT:
            if INF_NORM:
                mine = tl.maximum(mine, total)
            elif ROOTED:
                mine = norm_of_two(mine, total, P)
            else:
                mine += total
        else:
            tl.store(partials_ptr + chunk, total)
        chunk += n_programs

    if ONE_SEGMENT:
        tl.store(partials_ptr + program, mine)
        tl.debug_barrier()  # all threads must be done before one thread takes the ticket
        ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
        if ticket == n_programs - 1:
            whole = sum_of_partials(partials_ptr, 0, n_programs, P, INF_NORM, ROOTED, REDUCE_SIZE)
            n_bad = store_summary(
                whole, 0, summary_ptr, segment_counts_ptr, inv_scale_ptr, n_segments,
                P, INF_NORM, ROOTED, HAS_SCALE,
            )  # fmt: skip
            if n_bad > 0.0:
                move_counts(tensor_counts_ptr, counts_ptr, 0, 3 * n_tensors, REDUCE_SIZE)
            tl.store(ticket_ptr, 0)


@functools.cache
def launcher_of(tuning: Tuning) -> Launcher:
    """Returns the launcher for a tuning."""
    return Launcher(measure_kernel, tuning.num_warps, tuning.max_registers)


def group_of(dtype: torch.dtype, norm_type: float, wide: bool) -> int:
    """Returns the number of squares added in float32; see the table in the module docstring."""
    if norm_type != 2.0 or dtype is torch.float64:
        return 1
    if dtype is torch.float32:
        return 1 if wide else 4
    return 2 if wide else 8


def measure_chunks(
    table: ChunkTable,
    device: torch.device,
    dtype: torch.dtype,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None,
    rooted: bool,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Measures the gradients of a table.

    Args:
        table: The chunk table.
        device: Device of the gradients.
        dtype: Dtype of the gradients.
        n_segments, n_tensors: S and T.
        norm_type: p.
        inv_scale: `()`: factor of the gradients, applied to the results; None: 1.
        rooted: Whether to return norms instead of power sums.
        tuning: Launch parameters. Default: None, the parameters for the norm and dtype.

    Returns:
        `summary` float64 `(4, S)` and `counts` int64 `(3, T)`; see `stages.grad_stats.GradStats`.
    """
    layout = table.layout
    n_chunks = layout.n_chunks
    if not n_chunks:
        summary = torch.zeros(SUMMARY_ROWS.value, n_segments, dtype=torch.float64, device=device)
        return summary, torch.zeros(3, n_tensors, dtype=torch.int64, device=device)
    one_segment = n_segments == 1
    tuning = tuning or tuning_of(norm_type, dtype)
    grid = min(n_programs(device, tuning), n_chunks)
    summary = torch.empty(SUMMARY_ROWS.value, n_segments, dtype=torch.float64, device=device)
    counts = torch.empty(3, n_tensors, dtype=torch.int64, device=device)
    scale, scale_dtype = summary, None
    if inv_scale is not None:
        scale, scale_dtype = inv_scale.to(device, non_blocking=True), inv_scale.dtype
    launch = _variant(device, dtype, norm_type, rooted, one_segment, scale_dtype, tuning)
    n_partials = grid if one_segment else n_chunks
    own = scratch.take(device, n_zeros(n_segments, n_tensors), n_partials)
    tensors = (
        table.addresses,
        layout.chunks,
        layout.pieces,
        own.zeros,
        own.partials,
        counts,
        summary,
        scale,
    )
    launch(grid, tensors, n_chunks, n_segments, n_tensors)
    if not one_segment:
        reduce_segments(layout.starts, own, counts, summary, scale, norm_type, rooted, scale_dtype)
    scratch.keep(own)
    return summary, counts


@functools.lru_cache(maxsize=256)
def _variant(
    device: torch.device,
    dtype: torch.dtype,
    norm_type: float,
    rooted: bool,
    one_segment: bool,
    scale_dtype: torch.dtype | None,
    tuning: Tuning,
) -> Variant:
    group = group_of(dtype, norm_type, wide_fp64(device))
    has_scale = scale_dtype is not None
    constants = constants_of(dtype, norm_type, rooted, group, one_segment, has_scale, tuning)
    return launcher_of(tuning).variant(device, **constants)


def constants_of(
    dtype: torch.dtype,
    norm_type: float,
    rooted: bool,
    group: int,
    one_segment: bool,
    has_scale: bool,
    tuning: Tuning,
) -> dict[str, Any]:
    """Returns the constants of the kernel, in order."""
    item = dtype.itemsize
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ITEM_SIZE": item,
        "P": norm_type,
        "INF_NORM": norm_type == math.inf,
        "ROOTED": rooted,
        "GROUP": group,
        "ONE_SEGMENT": one_segment,
        "HAS_SCALE": has_scale,
        "BLOCK_SIZE": tuning.block_bytes // item,
        "VEC": 16 // item,
        "REDUCE_SIZE": REDUCE_SIZE,
        "EVICTION": tuning.eviction,
    }
