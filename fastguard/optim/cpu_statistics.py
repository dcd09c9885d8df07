"""The statistics of an update on a CPU, computed for each piece while it is in the cache.

The weights of a piece are copied before its update, and subtracted from the new weights afterward,
in memory that stays in the cache. Squares are computed in float32. They are added in float32 over
blocks for long tensors, and in float64 for short tensors; the relative error of a sum is below
1e-6. Where the range of float32 does not suffice, and for NaN and infinity, a sum is computed again
in float64.

I/O: no memory traffic beyond the update itself.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.vectors import in_memory_order, sums_of_squares
from fastguard.optim import bits
from fastguard.optim.contract import Update
from fastguard.optim.pieces import Piece
from fastguard.optim.scratch import Scratch

BLOCK = 2048
"""Number of elements whose squares are added in float32."""
ALONE = 10_000
"""Up to this number of elements, OpenBLAS computes a dot product on one thread."""
LONG = 1000
"""Mean number of elements from which each tensor of a piece gets a separate dot product."""
TINY = 2.0**-90
"""If the mean square is below this number, squares may have underflowed in float32."""


class PieceStatistics:
    """Adds up the statistics of an update, piece by piece.

    Args:
        update: An update with `statistics`.
    """

    def __init__(self, update: Update) -> None:
        assert update.statistics is not None
        self._out = update.statistics.numpy()
        self._master, self._stored_dtype = update.master, update.parameters[0].dtype
        self._limit = 0.9 * torch.finfo(self._stored_dtype).max
        self._scratch = Scratch(update.dtype)
        self._old = self._scratch.line("old", 0)
        self._bound = 0.0

    @staticmethod
    def of(update: Update) -> PieceStatistics | None:
        """Returns None if the update has no `statistics`."""
        return None if update.statistics is None else PieceStatistics(update)

    def before(self, piece: Piece, weights: list[Tensor]) -> None:
        """Adds the squares of the exact weights of a piece, and keeps a copy of the weights.

        Args:
            piece: The piece, which is about to be updated.
            weights: The tensors of the piece, or one vector with all of their elements.
        """
        is_view = len(weights) == 1 and weights[0].dtype is self._scratch.dtype
        if is_view:  # first, since a sum reads uncached memory faster than a copy does
            self._bound = self._add_squares(piece, in_memory_order(weights[0]), 0)
        self._old = self._scratch.copied("old", weights)
        if not is_view:
            self._bound = self._add_squares(piece, self._old, 0)

    def after(self, piece: Piece, weights: list[Tensor]) -> None:
        """Adds the other statistics of a piece, after its update.

        Args:
            piece: The piece.
            weights: The new exact weights, as in `before`; without a master, the stored weights.
        """
        new = weights[0] if len(weights) == 1 else None
        if new is None or new.dtype is not self._scratch.dtype:
            new = self._scratch.copied("new", weights)
        new = in_memory_order(new)
        change = torch.sub(new, self._old, out=self._old)
        bound = self._bound + self._add_squares(piece, change, 1)
        if not bound < self._limit:  # the condition is True for NaN
            bad = ~self._stored(new).isfinite()
            self._out[piece.members, 2] += _sums_of_parts(bad.numpy(), _sizes(piece), np.int64)

    def _add_squares(self, piece: Piece, x: Tensor, column: int) -> float:
        """Adds the sums of the squares of the finite elements of each tensor of a piece.

        Args:
            piece: The piece.
            x: The elements of the piece, in the dtype of the arithmetic.
            column: The column of the statistics.

        Returns:
            An upper bound of all magnitudes; infinite or NaN if any element is, or if a square
            overflows.
        """
        v = x.detach().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            if len(piece.members) == 1:
                squares = _sum_of_squares(v)
                is_sure = TINY * len(v) < squares < math.inf  # the comparison is False for NaN
                self._out[piece.members[0], column] += squares if is_sure else _in_float64(v)
                return math.sqrt(squares)
            sizes = _sizes(piece)
            squares = self._sums_of_squares(v, sizes)
        bound = math.sqrt(squares.max())
        ends = sizes.cumsum()
        for i in np.flatnonzero(~((squares > TINY * sizes) & (squares < np.inf))):
            squares[i] = _in_float64(v[ends[i] - sizes[i] : ends[i]])
        self._out[piece.members, column] += squares
        return bound

    def _sums_of_squares(self, v: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Returns the sum of squares of each tensor of a vector, float64 `(k,)`."""
        # takes half the time of the sums below
        if sizes.max() < ALONE and len(v) > LONG * len(sizes):
            ends = accumulate(sizes.tolist(), initial=0)
            return np.array([(part := v[i:j]).dot(part) for i, j in pairwise(ends)], np.float64)
        into = self._scratch.line("squares", len(v)).numpy()
        return _sums_of_parts(np.multiply(v, v, out=into), sizes, np.float64)

    def _stored(self, new: Tensor) -> Tensor:
        """Returns exact weights in the form in which they are stored."""
        return bits.split(new)[0] if self._master == "remainder" else new.to(self._stored_dtype)


def _sizes(piece: Piece) -> np.ndarray:
    return np.array(list(map(Tensor.numel, piece.parameters)))


def _sum_of_squares(v: np.ndarray) -> float:
    n_rows, rest = divmod(len(v), BLOCK)
    total = 0.0
    if n_rows:
        blocks = sums_of_squares(v[: n_rows * BLOCK].reshape(n_rows, 1, BLOCK))
        total = float(blocks.sum(dtype=np.float64))
    return total + float(v[-rest:].dot(v[-rest:])) if rest else total


def _in_float64(v: np.ndarray) -> float:
    """Returns the sum of squares of the finite elements, in float64."""
    if not v.any():  # for example, if no weight changed
        return 0.0
    wide = np.where(np.isfinite(v), v, 0.0).astype(np.float64)
    return float(wide.dot(wide))


def _sums_of_parts(values: np.ndarray, sizes: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the sums of consecutive parts of a vector, `(k,)`; some may be empty."""
    sums = np.zeros(len(sizes), dtype)
    some = np.flatnonzero(sizes)
    if len(some):
        starts = sizes.cumsum() - sizes
        sums[some] = np.add.reduceat(values, starts[some], dtype=dtype)
    return sums
