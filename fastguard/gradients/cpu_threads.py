"""Limits CPU work to one thread where waiting for a second thread could cost more than it saves.

torch splits an operation on 32,768 or more elements among its threads, and MKL a dot product of any
length. On idle cores that halves the time. If other processes, such as data workers, keep the cores
busy, the operation waits until the scheduler gives each thread a core: 10 to 50 ms for an operation
that takes 20 µs [2 cores, 2 busy processes]. Therefore

* small tensors are joined to vectors that one thread reads, however many there are: torch also
  reads each of them on one thread;
* large tensors are read and written in pieces on one thread, if they are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]  # accepted by torch's foreach functions

DOT = 2**13  # elements of a dot product; OpenBLAS leaves up to 10,000 to one thread
GRAIN = 2**15 - 16  # elements that torch leaves to one thread: fewer than 32,768; whole cache lines
FEW = 2**20  # elements up to which a second thread saves less than 0.2 ms


def sums_of_squares(rows: np.ndarray) -> np.ndarray:
    """Returns the sum of squares of each row, on one thread, in the dtype of the elements.

    Args:
        rows: `(..., 1, n)`; one dot product of n elements per row, all in a single call.
    """
    return np.matmul(rows, rows.swapaxes(-1, -2))[..., 0, 0]


def sum_of_squares(x: np.ndarray) -> float:
    """Returns the sum of squares of a float64 vector of any length, on one thread.

    Like numpy, it warns on overflow; call it under `np.errstate`.
    """
    n_rows, rest = divmod(len(x), DOT)
    if not n_rows:
        return x.dot(x).item()
    total = sum(sums_of_squares(x[: n_rows * DOT].reshape(n_rows, 1, DOT)).tolist())
    return total + x[-rest:].dot(x[-rest:]).item() if rest else total


def few(sizes: Iterable[int]) -> bool:
    """Whether tensors of these sizes are read and written on one thread.

    This is so if the large ones among them have fewer than `FEW` elements.
    """
    return sum(n for n in sizes if n > GRAIN) < FEW


def in_pieces(tensors: Tensors, sizes: Sequence[int] | None = None) -> Tensors:
    """Returns the elements of tensors on one device as views that torch leaves to one thread each.

    Args:
        tensors: The tensors.
        sizes: Number of elements of each, if known. Default: None.

    Returns:
        The tensors themselves if all are small, if they are more than `few`, or if they are not on
        a CPU; a tensor whose strides leave holes stays whole.
    """
    if sizes is None:
        sizes = list(map(Tensor.numel, tensors))
    if max(sizes, default=0) <= GRAIN or not (tensors[0].is_cpu and few(sizes)):
        return tensors
    return [piece for t in tensors for piece in _pieces(t)]


def _pieces(t: Tensor) -> Sequence[Tensor]:
    if t.numel() <= GRAIN:
        return (t,)
    if t.dim() == 1 and t.is_contiguous():
        return t.split(GRAIN)
    # such as channels_last
    by_stride = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return by_stride.view(-1).split(GRAIN) if by_stride.is_contiguous() else (t,)
