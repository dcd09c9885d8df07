"""Norms of the rows of CPU tensors, read once.

The sum of squares of a row is a sum over blocks, each summed in float32:

- Large tensors: `torch.linalg.vector_norm`, in blocks of at most 256 elements, on several threads
  if torch has them. The norms of up to 64 blocks are combined by the same function. The largest
  relative error of a norm was 3.6e-7, for rows of a constant.
- All other tensors: dot products of NumPy, in blocks of at most 512 elements, on one thread. The
  largest error was 1e-7.

Underflow in float32 affects only norms below 1e-15. `exact_norms` computes rows in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.vectors import concatenated, flat, sums_of_squares

LONGEST_DOT = 512  # elements of a dot product in float32
LONGEST_NORM = 256  # elements of a `vector_norm` in float32, which has fewer partial sums
MOST_BLOCKS = 64  # blocks of a row whose norms are combined in float32
PIECE = 2**18  # elements that are upcast at a time

_PLAIN = torch.float32, torch.float64  # dtypes that are not upcast
_vector_norm = torch.linalg.vector_norm


def norms_of_stacks(stacks: Sequence[Tensor]) -> np.ndarray:
    """Returns the norms of rows, float64, on one thread.

    The norm of a row is infinite or NaN if any element is, or if its square overflows float32. Call
    this function under `np.errstate(all="ignore")`.

    Args:
        stacks: Tensors `(n, row)` of one dtype.
    """
    squares = np.concatenate([_squares(rows, _by_dots) for rows in stacks])
    return np.sqrt(squares, out=squares)


def norms_of_vectors(vectors: list[Tensor]) -> np.ndarray:
    """Returns the norms of small tensors of one dtype, computed in float64 on one thread."""
    values = _plain(concatenated(vectors))
    values = (values if values.dtype in _PLAIN else values.float()).numpy().astype(np.float64)
    np.multiply(values, values, out=values)
    starts = list(accumulate(map(Tensor.numel, vectors[:-1]), initial=0))
    return np.sqrt(np.add.reduceat(values, starts))


def norms_of_tensors(tensors: Sequence[Tensor], counts: Sequence[int]) -> np.ndarray:
    """Returns the norms of the units of large tensors, float32 or float64.

    Uses several threads. Each block is summed by one thread, so that the number of threads does not
    change the result. As for `norms_of_stacks`, norms can be infinite or NaN.

    Args:
        tensors: Tensors of one dtype.
        counts: Number of units of each tensor.
    """
    if len(tensors) == 1:
        return _norms_of_units(tensors[0], counts[0]).numpy()
    return torch.cat(list(map(_norms_of_units, tensors, counts))).numpy()


def _norms_of_units(t: Tensor, n: int) -> Tensor:
    row = t.numel() // n
    block = _block(row, LONGEST_NORM)
    n_blocks = row // block
    is_plain = t.dtype in _PLAIN and t.is_contiguous() and n_blocks * block == row
    if not is_plain or n_blocks > MOST_BLOCKS:
        return torch.from_numpy(np.sqrt(_squares(as_rows(t, n), _by_norms)))
    norms = _vector_norm(t.view(-1, block), dim=1)
    return norms if n_blocks == 1 else _vector_norm(norms.view(n, n_blocks), dim=1)


def exact_norms(
    stacks: Sequence[Tensor], norm_type: float, propagates: bool, again: np.ndarray, out: np.ndarray
) -> None:
    """Writes norms that are computed in float64 relative to the largest element.

    Args:
        stacks: Tensors `(n, row)` of one dtype.
        norm_type, propagates: See `fastguard.stages.reference_units.unit_coefs`.
        again: For each row of all stacks, whether to compute its norm.
        out: The norms of all rows.
    """
    end = 0
    for rows in stacks:
        start, end = end, end + len(rows)
        numbers = np.flatnonzero(again[start:end])
        if len(numbers):
            _exact(_plain(rows), numbers, norm_type, propagates, out[start:end])


def as_rows(x: Tensor, n: int) -> Tensor:
    """Returns a tensor as `(n, row)`, with elements in memory order to avoid a copy if possible."""
    if n == 1:
        return flat(x)[None] if x.dim() else x.reshape(1, 1)
    if not x.is_contiguous():  # for example channels_last
        inner = sorted(range(1, x.dim()), key=x.stride, reverse=True)
        x = x.permute(0, *inner)
    return x.reshape(n, -1)


def _plain(x: Tensor) -> Tensor:
    """Returns a tensor that `.numpy()` accepts: not a negative view, and without grad."""
    return x.detach().resolve_neg()


def _squares(rows: Tensor, sums: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """Returns the sums of squares of rows; rows of other dtypes are upcast in pieces."""
    rows = _plain(rows)
    if rows.dtype in _PLAIN:
        return sums(rows)
    n, row = rows.shape
    each = max(1, PIECE // row)
    return np.concatenate([sums(rows[i : i + each].float()) for i in range(0, n, each)])


def _by_norms(rows: Tensor) -> np.ndarray:
    """Returns the sums of squares of rows, from the norms of their blocks."""
    n, row = rows.shape
    block = _block(row, LONGEST_NORM)
    whole = row - row % block
    norms = _vector_norm(rows[:, :whole].view(n, -1, block), dim=2)
    out = np.square(norms.numpy(), dtype=np.float64).sum(1)
    if whole < row:
        out += np.square(_vector_norm(rows[:, whole:], dim=1).numpy(), dtype=np.float64)
    return out


def _by_dots(rows: Tensor) -> np.ndarray:
    """Returns the sums of squares of rows, from dot products of their blocks."""
    x = rows.numpy()
    n, row = x.shape
    block = _block(row, LONGEST_DOT)
    if block == row:
        return sums_of_squares(x[:, None]).astype(np.float64)
    whole = row - row % block
    blocks = x[:, :whole].reshape(n, -1, 1, block)
    out = np.add.reduce(sums_of_squares(blocks), 1, np.float64)
    if whole < row:
        out += sums_of_squares(x[:, None, whole:])
    return out


@functools.cache
def _block(row: int, longest: int) -> int:
    """Returns the length of blocks: a divisor of the row length if a large one exists."""
    if row <= longest:
        return row
    return next((d for d in range(longest, longest // 4, -1) if row % d == 0), longest)


def _exact(
    rows: Tensor, numbers: np.ndarray, norm_type: float, propagates: bool, out: np.ndarray
) -> None:
    """Writes the norms of these rows, computed in float64 relative to the largest element."""
    length = rows.shape[1]
    each = max(1, PIECE // length)
    for first in range(0, len(numbers), each):
        at = numbers[first : first + each]
        some = rows[at[0] : at[0] + 1] if len(at) == 1 else rows[torch.from_numpy(at)]
        columns = some.split(PIECE, dim=1)
        parts = [_power_sums(piece.double().numpy(), norm_type) for piece in columns]
        norms = _joined(parts, norm_type)
        if propagates:
            total = sum(piece.float().sum(1).double() for piece in map(_nonfinite, columns))
            bad = total.numpy()  # type: ignore[union-attr]
            norms = np.where(np.isnan(bad), np.nan, np.where(bad > 0, np.inf, norms))
        out[at] = norms


def _nonfinite(piece: Tensor) -> Tensor:
    """Returns 0 for finite elements, Inf for infinite ones, and NaN for NaN."""
    return torch.where(piece.isfinite(), 0.0, piece.abs().float())


def _power_sums(x: np.ndarray, norm_type: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest finite magnitude of each row, and the power sum relative to it."""
    x = np.abs(np.where(np.isfinite(x), x, 0.0))  # `isfinite` is False for NaN
    largest = x.max(1)
    if norm_type == math.inf:
        return largest, np.ones_like(largest)
    unit = np.where(largest > 0, largest, 1.0)
    return unit, ((x / unit[:, None]) ** norm_type).sum(1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], norm_type: float) -> np.ndarray:
    """Combines results of `_power_sums` for pieces of rows into norms of the rows."""
    unit = np.maximum.reduce([unit for unit, _ in parts])
    if norm_type == math.inf:
        return unit
    total = sum((own / unit) ** norm_type * power for own, power in parts)
    return unit * total ** (1 / norm_type)
