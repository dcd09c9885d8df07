"""Statistics of an update: norms of weights and of their changes, and counts of non-finite weights.

    partials[:, c] = sum of old^2, sum of (new - old)^2, non-finite new weights    of chunk c
    statistics[t]  = the sums of partials of the chunks of tensor t, in order

`update` computes the partials from values that are in registers. The squares of float32 values are
exact in float64, where they are added. Both orders of addition depend only on the table: there are
no atomics, and the same inputs and the same grid give the same bits.

Additional I/O: 24 bytes per chunk, written by `update` and read by a second launch with one program
per tensor. Statistics take 21 more instructions per element; see the table in `update`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.columns import CHUNKS_COLUMN, FIRST_CHUNK_COLUMN, TENSOR_COLUMNS
from fastguard.kernels.elements import as_arithmetic, widened
from fastguard.kernels.launch import Launcher, Variant

N_STATISTICS = tl.constexpr(3)
SIZE = 128  # partials that a program reads at a time


@triton.jit
def statistics_of(old, new, parameter, mask, VEC: tl.constexpr, SIZE: tl.constexpr):
    """Returns the statistics of a block, summed over the vectors of each thread.

    Args:
        old, new: `(SIZE,)`: the exact weights, in the dtype of the arithmetic.
        parameter: `(SIZE,)`: the new weights as stored.
        mask: Which elements count.

    Returns:
        Sums of squares of finite weights and changes, float64, and counts, int32: `(SIZE // VEC,)`.
    """
    INF: tl.constexpr = float("inf")
    change = new - old
    old = widened(tl.where(mask & (tl.abs(old) < INF), old, 0.0))  # the comparison is False for NaN
    change = widened(tl.where(mask & (tl.abs(change) < INF), change, 0.0))
    is_finite = tl.abs(as_arithmetic(parameter, tl.float32)) < INF
    bad = tl.where(mask & (is_finite == 0), 1, 0)
    if VEC > 1:
        squares = tl.sum(tl.reshape(old * old, (SIZE // VEC, VEC)), axis=1)
        changes = tl.sum(tl.reshape(change * change, (SIZE // VEC, VEC)), axis=1)
        return squares, changes, tl.sum(tl.reshape(bad, (SIZE // VEC, VEC)), axis=1)
    else:
        return old * old, change * change, bad


@triton.jit(
    do_not_specialize=["partials_ptr", "tensors_ptr", "found_inf_ptr", "out_ptr", "n_chunks"]
)
def combine_kernel(
    partials_ptr,  # float64 (N_STATISTICS, n_chunks)
    tensors_ptr,  # int64 (n_tensors, TENSOR_COLUMNS)
    found_inf_ptr,  # float32 (1,)
    out_ptr,  # float64 (n_tensors, N_STATISTICS), written unless the step is skipped
    n_chunks,
    SIZE: tl.constexpr,
):
    """Adds the partials of the chunks of each tensor; one program per tensor."""
    if tl.load(found_inf_ptr) != 0.0:  # in a skipped step, there are no partials
        return
    tensor = tl.program_id(0)
    row_ptr = tensors_ptr + TENSOR_COLUMNS * tensor
    first = tl.load(row_ptr + FIRST_CHUNK_COLUMN)
    n = tl.load(row_ptr + CHUNKS_COLUMN).to(tl.int32)
    for statistic in tl.static_range(N_STATISTICS):
        total = tl.zeros((SIZE,), dtype=tl.float64)
        i = 0
        while i < n:
            at = i + tl.arange(0, SIZE)
            total += tl.load(partials_ptr + statistic * n_chunks + first + at, mask=at < n, other=0)
            i += SIZE
        tl.store(out_ptr + N_STATISTICS * tensor + statistic, tl.sum(total, axis=0))


_combine = Launcher(combine_kernel, num_warps=1)


def partials_of(n_chunks: int, device: torch.device) -> Tensor:
    """Returns memory for the partials of an update."""
    return torch.empty(N_STATISTICS.value, n_chunks, dtype=torch.float64, device=device)


def combine(partials: Tensor, tensors: Tensor, found_inf: Tensor, statistics: Tensor) -> None:
    """Adds the partials of an update, without a sync.

    Args:
        partials: float64 `(3, C)`, from the update.
        tensors: The tensors of its layout.
        found_inf: float32 `()`; if it is not 0, nothing is written.
        statistics: float64 `(T, 3)`, contiguous, written.
    """
    launch = _combine_variant(statistics.device)
    pointers = (partials, tensors, found_inf, statistics)
    launch(len(statistics), pointers, partials.shape[1])


@functools.cache
def _combine_variant(device: torch.device) -> Variant:
    return _combine.variant(device, SIZE=SIZE)
