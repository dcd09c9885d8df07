"""Sums of squares on a CPU below float64: at the speed of memory, and true to float64.

What is large is read in float32, in *blocks*: eight rows of 256 elements of a large tensor, whose
norms `torch.linalg.vector_norm` takes in one read of the data, and then the norm of these eight; or
up to 10,000 elements of a tensor of middling size, by numpy's dot product, which keeps more sums
beside each other than `vector_norm` does, and gives a number where that gives a tensor; or 2048
elements of a vector of 10,000 to a million, all such blocks by one batched matrix product, which
keeps to one thread. Small tensors are gathered into such vectors, and summed in float64 outright if
they are few.

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

What the audit cannot see: gradients made for its places. A block of one constant is off by up to
7.3e-7 if it is read in rows, 4.6e-6 as a dot product; if the drawn blocks round one way and most of
the others the other way, the result is off by as much (norms 6e-7 off were made of 25 constant
tensors). Draws that depend on the data would only be harder to foresee. What is right for any data
costs 2.5 times as much: elements that become float64 in pieces of a level-2 cache, on two threads.

Tried and dropped: float64 throughout (1.8x slower), `vector_norm(dtype=torch.float64)` (20x), rows
of 32 (1.4x, and still up to 9e-8 off), squares into a buffer and `torch.sum` (1.6x, up to 3e-7
off); for 1000 tensors of 10,000 elements: gathered and read as rows (1.6x), `torch.dot` (1.3x),
`torch._foreach_norm` (1.15x, and its results are to be stacked).

Memory: working buffers of 11 MB a thread, and at most about 6 MB of temporaries.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.cpu_threads import FEW, GRAIN, sum_of_squares, sums_of_squares
from fastguard.stages.cpu.vectors import buffer, flat, gathered

ROW = 256
ROWS = 8  # of a block
BLOCK = ROWS * ROW  # smaller tensors are gathered
LARGE = 2**16  # larger ones are read in rows, by several threads, if together they are worth that
STAGE = 2**20  # elements of the buffer in which other dtypes become float32: 4 MB, a level-3 cache
JOINED = 2**19  # elements of small tensors that are joined at a time: 2 MB of float32
WIDE = 6 * GRAIN  # elements that become float64 at a time: 1.5 MB, a level-2 cache
SHARE = 2**27  # elements between two audits: bounds the row norms kept to 2 MB
EXACT_BELOW = 2**17  # with fewer elements, float64 throughout costs less than the audit
AUDITED = 12
DISAGREE = 1.2e-7  # standard deviation of audited errors; random data has 8e-8 at the most
ALONE = 10_000  # elements up to which OpenBLAS leaves a dot product to one thread


def _quantiles(n: int) -> np.ndarray:
    """One number in each of n equal parts of [0, 1); RandomState never changes its stream."""
    return (np.arange(n) + np.random.RandomState(0).rand(n)) / n


_FEW, _MANY = _quantiles(AUDITED), _quantiles(64 * AUDITED)

_Array = Tensor | np.ndarray
_norms = torch.linalg.vector_norm


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors as `power_sum` reads them: views and numpy arrays, good for as long as the memory of
    the tensors stays where it is.

    Attributes:
        small: What is gathered and summed in float64.
        sizes: How many elements each of these has.
        blocks: Everything else.
    """

    small: Sequence[Tensor]
    sizes: Sequence[int]
    blocks: Sequence[_Blocks]

    @staticmethod
    def of(tensors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Pieces:
        """The pieces of CPU tensors of one dtype below float64; `sizes`, if known, of each."""
        if sizes is None:
            sizes = list(map(Tensor.numel, tensors))
        if sum(sizes) < EXACT_BELOW:
            return Pieces(tensors, sizes, ())
        small, middling, large = _by_size(tensors, sizes)
        if len(small) == len(tensors):
            return Pieces(tensors, sizes, ())
        rows, ends = _in_rows(large)
        small += ends
        vectors = _in_blocks(_arrays(middling))
        blocks = []
        for share, counts in _shares(rows):
            blocks.append(_Blocks(share, counts, *vectors))
            vectors = (), ()
        return Pieces(small, list(map(Tensor.numel, small)), blocks)


def power_sum(pieces: Pieces) -> float:
    """The sum of the squares of all elements.

    Returns:
        True to 8e-8 of itself (the most that was seen of 2300 kinds and sizes: 7.1e-8); NaN or
        infinite if an element is, or if a square overflows float32.
        Squares below the smallest normal float32 may be lost.
    """
    total = 0.0
    for blocks in pieces.blocks:
        total += _audited_sum(blocks)
    if sum(pieces.sizes) < EXACT_BELOW:
        return total + exact_power_sum(pieces.small, pieces.sizes)
    return total + _audited_sum(_JoinedBlocks(pieces.small, pieces.sizes))


def exact_power_sum(tensors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> float:
    """The sum of the squares of tensors below float64, in float64 throughout; `sizes`, if known, of
    each.
    """
    total = 0.0
    for values, _, _ in gathered(tensors, JOINED, sizes, joined=JOINED):
        total += _exact_sum(values)
    return total


def _float32(values: Tensor) -> np.ndarray:
    """The elements of up to `JOINED` as a float32 vector, good until the next call."""
    if values.dtype is torch.float32:
        return values.numpy(force=True)
    staged = buffer("joined", JOINED, (JOINED,), torch.float32)[: values.numel()]
    _copy_on_one_thread(staged, values)
    return staged.numpy()


def _copy_on_one_thread(into: Tensor, values: Tensor) -> None:
    # `Tensor.split` is Python code and takes three times as long.
    torch._foreach_copy_(torch.unsafe_split(into, GRAIN), torch.unsafe_split(values, GRAIN))


def _exact_sum(values: Tensor) -> float:
    """The sum of the squares of a vector, in float64 on one thread."""
    if values.numel() <= ALONE:  # in the fewest calls
        few = values.double().numpy(force=True)
        return few.dot(few).item()
    total = 0.0
    n = values.numel()
    pieces = (values,) if n <= WIDE else values.split(WIDE)
    wide = buffer("wide", WIDE, (WIDE,), torch.float64)
    array = wide.numpy()
    with _quietly():
        for piece in pieces:
            n = piece.numel()
            if piece.dtype is torch.float32:
                array[:n] = piece.numpy(force=True)
            else:
                _copy_on_one_thread(wide[:n], piece)
            total += sum_of_squares(array[:n])
    return total


def _by_size(
    tensors: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What is gathered, what is a block of its own, and what is read in rows."""
    small: list[Tensor] = []
    middling: list[Tensor] = []
    large: list[Tensor] = []
    # numpy has no bfloat16, and a sum in float16 overflows: these become float32 as rows.
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


def _in_rows(large: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Views `(n, ROWS, ROW)` of tensors, and views of what is left at their ends."""
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
    """The tensors in groups of at most `SHARE` elements, at least one group; and how many blocks
    each has. A tensor of more comes in pieces.
    """
    counts = [n // BLOCK for n in map(Tensor.numel, large)]  # len() takes six times as long
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


class _Audited:
    """Blocks of which some are summed once more, in float64."""

    def exact_power_sums(self, numbers: Sequence[int]) -> list[float]:
        """The sums of squares of the blocks of these numbers, in float64."""
        blocks = (_float64(self._block(number)) for number in numbers)
        return [block.dot(block).item() for block in blocks]

    def _block(self, number: int) -> _Array:
        raise NotImplementedError


class _Blocks(_Audited):
    """The blocks of large tensors, `(n, ROWS, ROW)`; then of vectors, `(n, 1, BLOCK)`; then vectors
    that are one block each.
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
        self._opened: dict[int, _Array] = {}  # large tensors that were looked into

    @property
    def in_rows(self) -> int:
        """How many blocks are of large tensors; they come first."""
        return self._ends[len(self.large)]

    def power_sums(self) -> np.ndarray:
        """The sum of squares of each block, in float32 arithmetic within a block."""
        parts = [self._sums_of_rows()] if self.large else []
        with _quietly():
            parts.extend(map(sums_of_squares, self.stacks))
        if self.middling:
            # Not numpy.vdot, which asks for overrides and other dtypes: 0.2 µs.
            dots = map(np.ndarray.dot, self.middling, self.middling)
            with _quietly():
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
        blocks = self._opened.get(i)
        if blocks is None:
            blocks = self._opened[i] = _opened(self.large[i])
        return blocks[at]

    def exact_sum_of_vectors(self) -> float:
        """The sum of squares of all blocks but those in rows, in float64."""
        vectors = [*(stack.reshape(-1) for stack in self.stacks), *self.middling]
        return exact_power_sum(list(map(torch.from_numpy, vectors)))


class _JoinedBlocks(_Audited):
    """The blocks of small tensors: `BLOCK` elements of each vector that `gathered` makes of them,
    and what is left at its end.

    One audit for all: of each block it is known where its elements lie.
    """

    in_rows = 0

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self._tensors = tensors
        self._sizes = sizes
        self._vectors: list[tuple[int, int]] = []  # the tensors `[start:stop]` that each holds
        self._offsets: list[int] = []  # where in these the vector begins, in elements
        self._lengths: list[int] = []
        self._ends = [0]  # the number of blocks up to each vector

    def power_sums(self) -> np.ndarray:
        """The sum of squares of each block, in float32 arithmetic within a block."""
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
            with _quietly():
                parts.append(sums_of_squares(stack))
                if len(rest):
                    parts.append(rest.dot(rest).reshape(1))
            self._ends.append(self._ends[-1] + len(stack) + (len(rest) > 0))
        return np.concatenate(parts)

    def _block(self, number: int) -> _Array:
        i = bisect_right(self._ends, number) - 1
        begin = (number - self._ends[i]) * BLOCK
        end = min(begin + BLOCK, self._lengths[i])
        if i == len(self._lengths) - 1:  # the last vector is still there
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
        """The sum of squares of all blocks, in float64."""
        return exact_power_sum(self._tensors, self._sizes)


def _norms_of_rows(blocks: Tensor, out: Tensor) -> None:
    if blocks.dtype is torch.float32:
        _norms(blocks, dim=2, out=out)
        return
    most = STAGE // BLOCK
    n_pieces = -(-len(blocks) // most)
    each = -(-len(blocks) // n_pieces)  # of about one size: see `buffer`
    for piece, norms in zip(blocks.split(each), out.split(each), strict=True):
        staged = buffer("stage", len(piece), (most, ROWS, ROW), torch.float32)
        _norms(staged.copy_(piece), dim=2, out=norms)


def _in_blocks(arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The elements of float32 arrays in stacks of blocks, `(n, 1, BLOCK)`, and in vectors of at
    most `ALONE`, each a block.
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


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    try:
        return list(map(Tensor.numpy, tensors))
    except RuntimeError:  # of a gradient that has a gradient
        return [t.numpy(force=True) for t in tensors]


def _opened(tensor: Tensor) -> _Array:
    """In a form of which pieces cost little: numpy has no bfloat16, but takes half of the time."""
    return _arrays([tensor])[0] if tensor.dtype is torch.float32 else tensor


def _float64(block: _Array) -> np.ndarray:
    """The elements as a float64 vector."""
    if isinstance(block, Tensor):
        return block.double().numpy(force=True).ravel()
    return block.ravel().astype(np.float64)


def _quietly() -> np.errstate:
    """numpy warns of an overflow and of a signalling NaN; the caller looks at both again."""
    return np.errstate(over="ignore", invalid="ignore")


def _audited_sum(blocks: _Blocks | _JoinedBlocks) -> float:
    """The sum over all blocks, with the rounding bias that a sample of them shows taken out."""
    sums = blocks.power_sums()
    total, bias, disagree = _audit(sums, blocks, _FEW)
    if not disagree:
        return total * (1.0 + bias)
    total, bias, _ = _audit(sums[: blocks.in_rows], blocks, _MANY)
    return total * (1.0 + bias) + blocks.exact_sum_of_vectors()


def _audit(
    sums: np.ndarray, blocks: _Blocks | _JoinedBlocks, quantiles: np.ndarray
) -> tuple[float, float, bool]:
    """The total; the mean relative error of the blocks drawn at these quantiles of it; and whether
    their errors differ by more than those of random data do.
    """
    running = torch.from_numpy(sums).cumsum(0, dtype=torch.float64).numpy()  # 1/3 of numpy's time
    total = running[-1].item() if len(running) else 0.0
    if not 0.0 < total < math.inf:  # NaN too: the caller looks again
        return total, 0.0, False
    last = len(sums) - 1
    drawn = [min(k, last) for k in running.searchsorted(quantiles * total).tolist()]
    exact = blocks.exact_power_sums(drawn)
    # Floats of Python: behind a model that filled the caches, each call of numpy costs 20 µs.
    errors = [e / sums[k].item() - 1.0 for e, k in zip(exact, drawn, strict=True)]
    mean = sum(errors) / len(errors)
    variance = sum((e - mean) ** 2 for e in errors) / len(errors)
    return total, mean, variance >= DISAGREE**2
