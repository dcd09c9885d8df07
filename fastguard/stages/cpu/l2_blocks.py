"""Blocks of elements, the unit in which `l2_sums` sums squares in float32.

Single blocks can be summed again in float64, for the audit in `l2_sums`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.vectors import (
    GRAIN,
    buffer,
    flat,
    gathered,
    sum_of_squares,
    sums_of_squares,
)

ROW = 256
ROWS = 8  # rows of a block
BLOCK = ROWS * ROW
STAGE = 2**20  # elements in the buffer for upcasting to float32; 4 MB, which fits a level-3 cache
JOINED = 2**19  # elements of small tensors that are concatenated at a time: 2 MB of float32
WORTH_AN_ARRAY = 512  # mean size of float32 tensors above which each becomes a NumPy array
# elements that are converted to float64 at a time; 1.5 MB, which fits a level-2 cache
WIDE = 6 * GRAIN
SHARE = 2**27  # elements between two audits, which limits the buffers of row norms to 2 MB
ALONE = 10_000  # up to this number of elements, OpenBLAS computes a dot product on one thread

_Array = Tensor | np.ndarray
_norms = torch.linalg.vector_norm


class _Auditable:
    """Blocks that can be summed again in float64."""

    def exact_power_sums(self, numbers: Sequence[int]) -> list[float]:
        """Returns the sums of squares of the blocks with these numbers, in float64."""
        blocks = (_float64(self._block(number)) for number in numbers)
        return [block.dot(block).item() for block in blocks]

    def _block(self, number: int) -> _Array:
        raise NotImplementedError


class Blocks(_Auditable):
    """Blocks of large and medium tensors, numbered in the order of the arguments.

    Args:
        large: Views of large tensors, `(n, ROWS, ROW)`, with n blocks each.
        counts: Number of blocks of each large tensor.
        stacks: float32 arrays `(n, 1, BLOCK)`, with n blocks each.
        middling: float32 vectors, one block each.
    """

    def __init__(
        self,
        large: Sequence[Tensor],
        counts: Sequence[int],
        stacks: Sequence[np.ndarray],
        middling: Sequence[np.ndarray],
    ) -> None:
        self.large = large
        self.stacks = stacks
        self.middling = middling
        self._counts = counts
        self._ends = list(accumulate([*counts, *map(len, stacks)], initial=0))
        self._indexable: dict[int, _Array] = {}  # large tensors with blocks that were audited

    @property
    def in_rows(self) -> int:
        """Number of blocks of large tensors; these blocks come first."""
        return self._ends[len(self.large)]

    def power_sums(self) -> np.ndarray:
        """Returns the sum of squares of each block, computed in float32 within a block."""
        parts = [self._sums_of_rows()] if self.large else []
        with _no_warnings():
            parts.extend(map(sums_of_squares, self.stacks))
        if self.middling:
            # numpy.vdot would check for overrides and dtypes, which takes 0.2 µs.
            dots = map(np.ndarray.dot, self.middling, self.middling)
            with _no_warnings():
                parts.append(np.fromiter(dots, np.float64, len(self.middling)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0), *parts])

    def _sums_of_rows(self) -> np.ndarray:
        n, most = self.in_rows, SHARE // BLOCK
        of_rows = buffer("rows", n, (most, ROWS), torch.float32)
        outs = (of_rows,) if len(self.large) == 1 else of_rows.split(self._counts)
        for blocks, out in zip(self.large, outs, strict=True):
            _norms_of_rows(blocks, out)
        of_blocks = buffer("blocks", n, (most,), torch.float32)
        _norms(of_rows, dim=1, out=of_blocks)
        return np.square(of_blocks.numpy(), dtype=np.float64)

    def _block(self, number: int) -> _Array:
        i = bisect_right(self._ends, number) - 1
        at, in_stacks = number - self._ends[i], i - len(self.large)
        if in_stacks == len(self.stacks):
            return self.middling[at]
        if in_stacks >= 0:
            return self.stacks[in_stacks][at]
        blocks = self._indexable.get(i)
        if blocks is None:
            blocks = self._indexable[i] = _indexable(self.large[i])
        return blocks[at]

    def exact_sum_of_vectors(self) -> float:
        """Returns the sum of squares of all blocks except blocks of large tensors, in float64."""
        return _float64_sum_of_arrays([*self.stacks, *self.middling])


class JoinedBlocks(_Auditable):
    """Blocks of small tensors, which are gathered into vectors.

    A block has `BLOCK` elements of a vector; the last block of a vector may have fewer. Only the
    positions of the elements are kept, not the vectors, so that one audit can cover all blocks.
    """

    in_rows = 0

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self._tensors = tensors
        self._sizes = sizes
        self._vectors: list[tuple[int, int]] = []  # vector k holds elements of tensors[start:stop]
        self._offsets: list[int] = []  # number of elements of tensors[start] before vector k
        self._lengths: list[int] = []
        self._ends = [0]  # number of blocks before each vector, and in total

    def power_sums(self) -> np.ndarray:
        """Returns the sum of squares of each block, computed in float32 within a block."""
        parts = []
        of = (-1, -1)
        for values, start, stop in gathered(self._tensors, JOINED, self._sizes, joined=JOINED):
            vector = self._vector = _float32(values)
            goes_on = (start, stop) == of
            of = start, stop
            self._vectors.append(of)
            self._offsets.append(self._offsets[-1] + self._lengths[-1] if goes_on else 0)
            self._lengths.append(len(vector))
            whole = len(vector) - len(vector) % BLOCK
            stack, rest = vector[:whole].reshape(-1, 1, BLOCK), vector[whole:]
            with _no_warnings():
                parts.append(sums_of_squares(stack))
                if len(rest):
                    parts.append(rest.dot(rest).reshape(1))
            self._ends.append(self._ends[-1] + len(stack) + (len(rest) > 0))
        return np.concatenate(parts)

    def _block(self, number: int) -> _Array:
        i = bisect_right(self._ends, number) - 1
        begin = (number - self._ends[i]) * BLOCK
        end = min(begin + BLOCK, self._lengths[i])
        if i == len(self._lengths) - 1:  # the last vector is still in the buffer
            return self._vector[begin:end]
        start, stop = self._vectors[i]
        if stop - start == 1:
            at = self._offsets[i]
            return flat(self._tensors[start])[at + begin : at + end]
        ends = list(accumulate(self._sizes[start:stop]))
        first, last = bisect_right(ends, begin), bisect_left(ends, end)
        at = ends[first] - self._sizes[start + first]
        parts = [t.reshape(-1) for t in self._tensors[start + first : start + last + 1]]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined[begin - at : end - at]

    def exact_sum_of_vectors(self) -> float:
        """Returns the sum of squares of all blocks, in float64."""
        return exact_power_sum(self._tensors, self._sizes)


def _norms_of_rows(blocks: Tensor, out: Tensor) -> None:
    if blocks.dtype is torch.float32:
        _norms(blocks, dim=2, out=out)
        return
    most = STAGE // BLOCK
    n_pieces = -(-len(blocks) // most)
    each = -(-len(blocks) // n_pieces)  # pieces of similar size, to reuse the slice in `buffer`
    for piece, norms in zip(blocks.split(each), out.split(each), strict=True):
        staged = buffer("stage", len(piece), (most, ROWS, ROW), torch.float32)
        _norms(staged.copy_(piece), dim=2, out=norms)


def exact_power_sum(tensors: Sequence[Tensor], sizes: Sequence[int]) -> float:
    """Returns the sum of squares of tensors below float64, computed in float64.

    Args:
        tensors: CPU tensors of one dtype.
        sizes: Number of elements of each tensor.
    """
    n = sum(sizes)
    if n > ALONE and n >= WORTH_AN_ARRAY * len(sizes) and tensors[0].dtype is torch.float32:
        return _float64_sum_of_arrays(as_arrays(tensors))
    total = 0.0
    for values, _, _ in gathered(tensors, JOINED, sizes, joined=JOINED):
        total += _float64_sum(values)
    return total


def _float64_sum_of_arrays(arrays: Sequence[np.ndarray]) -> float:
    """Returns the sum of squares of float32 arrays, in float64 on one thread.

    NumPy concatenates and converts them in one pass; two passes take 1.5 times as long.
    """
    total = 0.0
    wide = buffer("wide", WIDE, (WIDE,), torch.float64).numpy()
    with _no_warnings():
        for batch, n in _batches(arrays):
            total += sum_of_squares(np.concatenate(batch, out=wide[:n]))
    return total


def _batches(arrays: Sequence[np.ndarray]) -> Iterator[tuple[list[np.ndarray], int]]:
    """Yields vectors with at most `WIDE` elements in total, and the number of these elements."""
    batch: list[np.ndarray] = []
    filled = 0
    for array in arrays:
        # order "K" does not copy a channels_last tensor
        vector = array if array.ndim == 1 else array.ravel("K")
        n = len(vector)
        if filled + n > WIDE:
            if batch:
                yield batch, filled
            batch, filled = [], 0
            while n > WIDE:
                yield [vector[:WIDE]], WIDE
                vector = vector[WIDE:]
                n -= WIDE
        batch.append(vector)
        filled += n
    if batch:
        yield batch, filled


def _float32(values: Tensor) -> np.ndarray:
    """Returns up to `JOINED` elements as a float32 vector, valid until the next call."""
    if values.dtype is torch.float32:
        return values.numpy(force=True)
    staged = buffer("joined", JOINED, (JOINED,), torch.float32)[: values.numel()]
    _copy_on_one_thread(staged, values)
    return staged.numpy()


def _copy_on_one_thread(into: Tensor, values: Tensor) -> None:
    if values.numel() <= GRAIN:
        into.copy_(values)
        return
    # Tensor.split is implemented in Python and takes three times as long.
    torch._foreach_copy_(torch.unsafe_split(into, GRAIN), torch.unsafe_split(values, GRAIN))


def _float64_sum(values: Tensor) -> float:
    """Returns the sum of squares of a vector, in float64 on one thread."""
    if values.numel() <= ALONE:  # takes fewer calls than the code below
        few = values.double().numpy(force=True)
        return few.dot(few).item()
    total = 0.0
    n = values.numel()
    pieces = (values,) if n <= WIDE else values.split(WIDE)
    wide = buffer("wide", WIDE, (WIDE,), torch.float64)
    array = wide.numpy()
    with _no_warnings():
        for piece in pieces:
            n = piece.numel()
            if piece.dtype is torch.float32:
                array[:n] = piece.numpy(force=True)
            else:
                _copy_on_one_thread(wide[:n], piece)
            total += sum_of_squares(array[:n])
    return total


def as_arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Returns CPU tensors as numpy arrays that share their memory."""
    try:
        return list(map(Tensor.numpy, tensors))
    except RuntimeError:  # tensors that require grad refuse .numpy()
        return [t.numpy(force=True) for t in tensors]


def _indexable(tensor: Tensor) -> _Array:
    """Returns an array if numpy has the dtype, since indexing an array takes half the time."""
    return as_arrays([tensor])[0] if tensor.dtype is torch.float32 else tensor


def _float64(block: _Array) -> np.ndarray:
    """Returns the elements as a float64 vector."""
    if isinstance(block, Tensor):
        return block.double().numpy(force=True).ravel()
    return block.ravel().astype(np.float64)


def _no_warnings() -> np.errstate:
    """Silences numpy's warnings about overflow and NaN; callers check the result for both."""
    return np.errstate(over="ignore", invalid="ignore")
