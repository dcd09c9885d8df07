"""Sums of squares on a CPU, for dtypes below float64: memory-bound, relative error below 8e-8.

The elements are summed in *blocks*, in float32:

- Large tensors: a block has eight rows of 256 elements. `torch.linalg.vector_norm` computes the
  norms of all rows in one read of the data, then the norms of eight row norms each.
- Medium tensors of up to 10,000 elements: a tensor is one block, summed by numpy's dot product,
  which keeps more partial sums than `vector_norm` and returns a number instead of a tensor.
- Vectors of 10,000 to a million elements: a block has 2048 elements; one batched matrix product on
  one thread sums all blocks. Small tensors are gathered into such vectors; if they have few
  elements in total, they are summed in float64 instead.

Numerics. The float32 sum of a block has a relative error of up to 2.3e-6. Over blocks of random
data the errors average out (1e-10 for 1e6 elements). Over similar blocks, as in a constant
gradient, the errors do not average out, because all have the same sign (constants gave an error of
3e-7; torch's own norm has an error of 4e-2 for them). So the bias is *measured* in an audit:
`AUDITED` blocks, drawn with probability proportional to their contribution, are summed again in
float64, and the total is corrected by their mean relative error. Drawing by contribution makes the
estimate unbiased for any distribution of the sum over the blocks: if one block contributes the
whole sum, every draw hits this block and the result is exact. If the errors of the drawn blocks
differ by more than on random data (as for blocks of several constants), the medium tensors are
summed in float64 and 64 times as many row blocks are drawn. Blocks are drawn at fixed quantiles, so
the same gradients give the same norm bit for bit. The quantiles are not evenly spaced: with
alternating blocks of two constants, evenly spaced quantiles would hit blocks of one constant only
(error 3e-7; with these quantiles 1e-8).

The audit fails on gradients that were constructed to defeat it. A block of one constant has an
error of up to 7.3e-7 if read in rows, and 4.6e-6 as a dot product. If the drawn blocks round one
way and most others the other way, the result has an error of that size (25 large constant tensors
were constructed with an error of 6e-7 in the norm, and 200 of 9,999 elements with 1.2e-6). Draws
that depend on the data would be harder to predict, but could be defeated too. An algorithm that is
accurate for any data converts elements to float64, in pieces that fit the level-2 cache, on two
threads. It takes 2.5 times as long.

Rejected alternatives: float64 throughout (1.8x slower), `vector_norm(dtype=torch.float64)` (20x),
rows of 32 (1.4x, and still errors of up to 9e-8), squares into a buffer and `torch.sum` (1.6x,
errors of up to 3e-7); for 1000 tensors of 10,000 elements: gathering them and reading rows (1.6x),
`torch.dot` (1.3x), `torch._foreach_norm` (1.15x, plus stacking the results).

Memory: working buffers of 11 MB per thread, and at most about 6 MB of temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.vectors import FEW, flat
from fastguard.stages.cpu.l2_blocks import (
    ALONE,
    BLOCK,
    ROW,
    ROWS,
    SHARE,
    Blocks,
    JoinedBlocks,
    as_arrays,
    exact_power_sum,
)

LARGE = 2**16  # larger tensors are read in rows, on several threads if there are enough elements
EXACT_BELOW = 2**17  # with fewer elements, summing in float64 is cheaper than the audit
AUDITED = 12  # blocks that are drawn
# std of the errors of drawn blocks above which more blocks are drawn; random data has 8e-8
DISAGREE = 1.2e-7


def _quantiles(n: int) -> np.ndarray:
    """Returns one random number in each of n equal parts of [0, 1); all calls return the same.

    The stream of RandomState is guaranteed never to change.
    """
    return (np.arange(n) + np.random.RandomState(0).rand(n)) / n


_FEW, _MANY = _quantiles(AUDITED), _quantiles(64 * AUDITED)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors prepared for `power_sum`: views and numpy arrays, valid while no tensor is moved.

    Attributes:
        small: Small tensors, which are gathered.
        sizes: Number of elements of each small tensor.
        blocks: All other elements.
    """

    small: Sequence[Tensor]
    sizes: Sequence[int]
    blocks: Sequence[Blocks]

    @staticmethod
    def of(tensors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Pieces:
        """Prepares CPU tensors of one dtype below float64; `sizes`: their elements, if known."""
        if sizes is None:
            sizes = list(map(Tensor.numel, tensors))
        if sum(sizes) < EXACT_BELOW:
            return Pieces(tensors, sizes, ())
        small, middling, large = _by_size(tensors, sizes)
        if len(small) == len(tensors):
            return Pieces(tensors, sizes, ())
        rows, ends = _as_rows(large)
        small += ends
        vectors = _as_blocks(as_arrays(middling))
        blocks = []
        for share, counts in _shares(rows):
            blocks.append(Blocks(share, counts, *vectors))
            vectors = (), ()
        return Pieces(small, list(map(Tensor.numel, small)), blocks)


def power_sum(pieces: Pieces) -> float:
    """Returns the sum of the squares of all elements.

    The relative error is below 8e-8 (largest error over 2300 kinds and sizes of data: 7.1e-8).
    Squares below the smallest normal float32 may be lost. The result is NaN or infinite if any
    element is, or if a square overflows float32.
    """
    total = 0.0
    for blocks in pieces.blocks:
        total += _audited_sum(blocks)
    if sum(pieces.sizes) < EXACT_BELOW:
        return total + exact_power_sum(pieces.small, pieces.sizes)
    return total + _audited_sum(JoinedBlocks(pieces.small, pieces.sizes))


def _by_size(
    tensors: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns small tensors (gathered later), medium tensors (vectors), large tensors (rows)."""
    small: list[Tensor] = []
    middling: list[Tensor] = []
    large: list[Tensor] = []
    # numpy has no bfloat16, and sums in float16 overflow, so both dtypes are upcast to float32 in
    # rows.
    is_float32 = tensors[0].dtype is torch.float32
    blocks_from = BLOCK if is_float32 else LARGE
    least, most = min(sizes), max(sizes)
    if most < blocks_from:
        return list(tensors), middling, large
    if blocks_from <= least and most < LARGE:
        return small, list(tensors), large
    for tensor, n in zip(tensors, sizes, strict=True):
        if n < blocks_from:
            small.append(tensor)
        elif n < LARGE:
            middling.append(tensor)
        else:
            large.append(tensor)
    if sum(map(Tensor.numel, large)) < FEW:  # not worth a second thread
        (middling if is_float32 else small).extend(large)
        large = []
    return small, middling, large


def _as_rows(large: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns views `(n, ROWS, ROW)` of tensors, and views of the remaining elements."""
    rows: list[Tensor] = []
    ends: list[Tensor] = []
    for tensor in large:
        n = tensor.numel()
        if n % BLOCK == 0 and tensor.is_contiguous():
            rows.append(tensor.view(-1, ROWS, ROW))
        else:
            vector, whole = flat(tensor), n - n % BLOCK
            ends.append(vector[whole:])
            rows.append(vector[:whole].view(-1, ROWS, ROW))
    return rows, ends


def _shares(large: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[int]]]:
    """Yields the tensors in groups of at most `SHARE` elements; at least one group.

    Larger tensors are split.

    Yields:
        The tensors of a group, and the number of blocks of each.
    """
    counts = [n // BLOCK for n in map(Tensor.numel, large)]  # `len` takes six times as long
    most = SHARE // BLOCK
    if sum(counts) <= most:
        yield list(large), counts
        return
    pieces = [piece for blocks in large for piece in blocks.split(most)]
    share: list[Tensor] = []
    filled: list[int] = []
    for piece in pieces:
        if sum(filled) + len(piece) > most:
            yield share, filled
            share, filled = [], []
        share.append(piece)
        filled.append(len(piece))
    yield share, filled


def _as_blocks(arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns float32 arrays as stacks of blocks `(n, 1, BLOCK)`, and as vectors.

    Each vector has at most `ALONE` elements and is one block.
    """
    stacks: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for array in arrays:
        vector = array if array.ndim == 1 else array.ravel()
        n = len(vector)
        if n <= ALONE:
            vectors.append(vector)
            continue
        whole = n - n % BLOCK
        stacks.append(vector[:whole].reshape(-1, 1, BLOCK))
        if whole < n:
            vectors.append(vector[whole:])
    return stacks, vectors


def _audited_sum(blocks: Blocks | JoinedBlocks) -> float:
    """Returns the sum over all blocks, corrected for the rounding bias of a sample of them."""
    sums = blocks.power_sums()
    total, bias, disagree = _audit(sums, blocks, _FEW)
    if not disagree:
        return total * (1.0 + bias)
    total, bias, _ = _audit(sums[: blocks.in_rows], blocks, _MANY)
    return total * (1.0 + bias) + blocks.exact_sum_of_vectors()


def _audit(
    sums: np.ndarray, blocks: Blocks | JoinedBlocks, quantiles: np.ndarray
) -> tuple[float, float, bool]:
    """Draws blocks at quantiles of the cumulative sum, and sums them again in float64.

    Returns:
        The total, the mean relative error of the drawn blocks, and whether their errors differ by
        more than on random data.
    """
    # takes a third of numpy's time
    running = torch.from_numpy(sums).cumsum(0, dtype=torch.float64).numpy()
    total = running[-1].item() if len(running) else 0.0
    if not 0.0 < total < math.inf:  # this is true for NaN too; the caller handles such totals
        return total, 0.0, False
    last = len(sums) - 1
    drawn = [min(k, last) for k in running.searchsorted(quantiles * total).tolist()]
    exact = blocks.exact_power_sums(drawn)
    # Python floats, because a call of numpy costs 20 µs after a model has filled the caches.
    errors = [e / sums[k].item() - 1.0 for e, k in zip(exact, drawn, strict=True)]
    mean = sum(errors) / len(errors)
    variance = sum((e - mean) ** 2 for e in errors) / len(errors)
    return total, mean, variance >= DISAGREE**2
