"""Sums of squares on a CPU below float64: at the speed of memory, and true to float64.

What is large is read in float32, in *blocks*: eight rows of 256 elements of a large tensor, each
one's norm by `torch.linalg.vector_norm` (one read of the data), squared and summed in float64; or a
whole tensor of middling size, by `numpy.vdot`, which keeps more sums beside each other than
`vector_norm` does, and gives a number where that gives a tensor. Small tensors are gathered and
summed in float64 outright.

Numerics. The float32 sum of a block is off by up to 2.3e-6. Over blocks of random data these errors
average out (1e-10 over 1e6 elements); over blocks that are alike, such as those of a constant
gradient, they do not: all are off in the same direction (3e-7 seen on constants, where torch's own
norm is 4e-2 off). So the bias is *measured*: `AUDITED` blocks, drawn in proportion to what they
contribute, are summed again in float64, and the mean relative error that they show is taken out of
the total. Drawing by contribution makes the estimate unbiased however unevenly the sum is spread:
if one block holds everything, every draw hits it and the result is exact. Where the drawn blocks
disagree by more than random data does (blocks of several constants, say), the middling tensors are
summed in float64 and 64 times as many rows are drawn. The draws are at fixed quantiles, so the same
gradients give the same norm bit for bit; but not at evenly spaced ones, which would show one half
alone of gradients that repeat at their pace (3e-7 off when blocks of two constants alternate; 1e-8
as it is).

Tried and dropped: float64 throughout (1.8x slower), `vector_norm(dtype=torch.float64)` (20x), rows
of 32 (1.4x, and still up to 9e-8 off), squares into a buffer and `torch.sum` (1.6x, up to 3e-7
off); for 1000 tensors of 10,000 elements: gathered and read as rows (1.6x), `torch.dot` (1.3x),
`torch._foreach_norm` (1.15x, and its results are to be stacked).

Memory: working buffers of 11 MB a thread, and at most about 6 MB of temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastguard.gather import buffer, flat, gathered

ROW = 256
BLOCK = 8 * ROW  # smaller tensors are gathered
LARGE = 2**15  # larger ones are read in rows, by several threads
STAGE = 2**20  # elements of the buffer in which other dtypes become float32: 4 MB, a level-3 cache
WIDE = 2**19  # elements that become float64 at a time: 4 MB; halves cost two more calls of torch
SHARE = 2**27  # elements between two audits: bounds the row norms kept to 2 MB
EXACT_BELOW = 3 * 2**19  # with fewer elements, float64 throughout costs less than the audit
AUDITED = 12
DISAGREE = 1.2e-7  # standard deviation of audited errors; random data has 8e-8 at the most
ALONE = 10_000  # elements up to which OpenBLAS leaves a dot product to one thread


def _quantiles(n: int) -> np.ndarray:
    """One number in each of n equal parts of [0, 1); RandomState never changes its stream."""
    return (np.arange(n) + np.random.RandomState(0).rand(n)) / n


_FEW, _MANY = _quantiles(AUDITED), _quantiles(64 * AUDITED)

_row_norms = torch.linalg.vector_norm


def power_sum(tensors: Sequence[Tensor]) -> float:
    """The sum of the squares of all elements.

    Args:
        tensors: CPU tensors of one dtype below float64.

    Returns:
        True to 2e-7 of itself; NaN or infinite if an element is, or if a square overflows float32.
        Squares below the smallest normal float32 may be lost.
    """
    sizes = list(map(Tensor.numel, tensors))
    if sum(sizes) < EXACT_BELOW:
        return exact_power_sum(tensors, sizes)
    small, middling, large = _by_size(tensors, sizes)
    total = 0.0
    for share in _shares(large):
        total += _audited_sum(_Blocks(share, middling))
        middling = []
    return total + exact_power_sum(small)


def exact_power_sum(tensors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> float:
    """The same in float64 throughout."""
    total = 0.0
    for values, _, _ in gathered(tensors, WIDE, sizes):
        wide = buffer("wide", WIDE, torch.float64)[: values.numel()].copy_(values)
        total += torch.dot(wide, wide).item()
    return total


def _by_size(
    tensors: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What is gathered, what is a block of its own, and vectors of whole blocks."""
    small: list[Tensor] = []
    middling: list[Tensor] = []
    large: list[Tensor] = []
    # numpy has no bfloat16, and a sum in float16 overflows: these become float32 as rows.
    blocks_from = BLOCK if tensors[0].dtype is torch.float32 else LARGE
    if blocks_from <= min(sizes) and max(sizes) < LARGE:
        return small, list(tensors), large
    for tensor, n in zip(tensors, sizes, strict=True):
        if n < blocks_from:
            small.append(tensor)
        elif n < LARGE:
            middling.append(tensor)
        else:
            vector, rest = flat(tensor), n % BLOCK
            if rest:
                small.append(vector[n - rest :])
                vector = vector[: n - rest]
            large.append(vector)
    return small, middling, large


def _shares(vectors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The vectors in groups of at most `SHARE` elements, longer ones in pieces; at least one."""
    share: list[Tensor] = []
    filled = 0
    for vector in vectors:
        for piece in vector.split(SHARE) if vector.numel() > SHARE else (vector,):
            if filled + piece.numel() > SHARE:
                yield share
                share, filled = [], 0
            share.append(piece)
            filled += piece.numel()
    yield share


@dataclass(slots=True)
class _Blocks:
    """The blocks of large vectors, followed by middling tensors, each a block."""

    vectors: Sequence[Tensor]
    middling: Sequence[Tensor]

    def power_sums(self) -> np.ndarray:
        """The sum of squares of each block, in float32 arithmetic within a row or a tensor."""
        rows = buffer("rows", SHARE // ROW, torch.float32)
        filled = 0
        for vector in self.vectors:
            n_rows = vector.numel() // ROW
            _norms_of_rows(vector, rows[filled : filled + n_rows])
            filled += n_rows
        sums = rows[:filled].double().square_().view(-1, BLOCK // ROW).sum(1).numpy()
        return np.concatenate([sums, _square_sums(self.middling)]) if self.middling else sums

    def exact_power_sums(self, numbers: np.ndarray) -> np.ndarray:
        """The sums of squares of the blocks of these numbers, in float64."""
        ends = np.cumsum([0] + [vector.numel() // BLOCK for vector in self.vectors])
        sums = []
        for number, i in zip(numbers.tolist(), ends.searchsorted(numbers, "right"), strict=True):
            if number < ends[-1]:
                start = (number - int(ends[i - 1])) * BLOCK
                block = self.vectors[i - 1].narrow(0, start, BLOCK)
            else:
                block = self.middling[number - int(ends[-1])]
            sums.append(_square_sum(_float64(block)))
        return np.array(sums)


def _norms_of_rows(vector: Tensor, out: Tensor) -> None:
    if vector.dtype is torch.float32:
        _row_norms(vector.contiguous().view(-1, ROW), dim=1, out=out)
        return
    for piece, norms in zip(vector.split(STAGE), out.split(STAGE // ROW), strict=True):
        staged = buffer("stage", STAGE, torch.float32)[: piece.numel()].copy_(piece)
        _row_norms(staged.view(-1, ROW), dim=1, out=norms)


def _square_sums(tensors: Sequence[Tensor]) -> np.ndarray:
    """The sum of squares of each of these float32 tensors, in float32 arithmetic; float64."""
    try:
        arrays = list(map(Tensor.numpy, tensors))
    except RuntimeError:  # of a gradient that has a gradient
        arrays = [t.numpy(force=True) for t in tensors]
    return np.array([_square_sum(a) for a in arrays])


def _float64(block: Tensor) -> np.ndarray:
    if block.dtype is torch.float32:
        return block.numpy(force=True).astype(np.float64)  # half the time of torch's conversion
    return block.double().numpy(force=True)  # numpy has no bfloat16


def _square_sum(values: np.ndarray) -> float:
    if values.size <= ALONE:
        return float(np.vdot(values, values))
    vector = values.reshape(-1)
    pieces = [vector[k : k + ALONE] for k in range(0, vector.size, ALONE)]
    return float(sum(map(np.vdot, pieces, pieces)))


def _audited_sum(blocks: _Blocks) -> float:
    """The sum over all blocks, with the rounding bias that a sample of them shows taken out."""
    sums = blocks.power_sums()
    total, errors = _audit(sums, blocks, _FEW)
    bias = errors.mean().item()
    if not errors.std() >= DISAGREE:
        return total * (1.0 + bias)
    total, errors = _audit(sums[: len(sums) - len(blocks.middling)], blocks, _MANY)
    return total * (1.0 + errors.mean().item()) + exact_power_sum(blocks.middling)


def _audit(sums: np.ndarray, blocks: _Blocks, quantiles: np.ndarray) -> tuple[float, np.ndarray]:
    """The total, and the relative errors of the blocks drawn at these quantiles of it."""
    running = sums.cumsum()
    total = running[-1].item() if len(running) else 0.0
    if not 0.0 < total < math.inf:  # NaN too: the caller looks again
        return total, np.zeros(1)
    drawn = running.searchsorted(quantiles * total).clip(max=len(sums) - 1)
    return total, blocks.exact_power_sums(drawn) / sums[drawn] - 1.0
