"""Limits CPU work to one thread where waiting for a second thread could cost more than it saves.

torch splits an operation on 32,768 or more elements among its threads; MKL does so for a dot
product of any length. If the cores are idle, this halves the time. If other processes, such as data
workers, keep them busy, the operation waits until the scheduler gives each thread a core: 10 to
50 ms for an operation that takes 20 µs [2 cores, 2 busy processes]. Therefore

* small tensors, however many, are concatenated into vectors that one thread reads, just as torch
  reads a single small tensor on one thread;
* large tensors with fewer than `FEW` elements in total are processed in pieces, on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from fastguard.gradients.memory_order import in_memory_order

Tensors = list[Tensor] | tuple[Tensor, ...]  # accepted by torch's foreach functions

DOT = 2**13  # elements per dot product; OpenBLAS uses one thread for up to 10,000
GRAIN = 2**15 - 16  # elements per piece: whole cache lines, and below torch's limit of 32,768
FEW = 2**20  # with fewer elements, a second thread saves less than 0.2 ms


def sums_of_squares(rows: np.ndarray) -> np.ndarray:
    """Returns the sum of squares of each row, on one thread, in the dtype of the elements.

    Args:
        rows: `(..., 1, n)`. All rows are computed in one call, each as a dot product.
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
    """Whether tensors of these sizes should be processed on one thread.

    True if those larger than `GRAIN` have fewer than `FEW` elements in total.
    """
    return sum(n for n in sizes if n > GRAIN) < FEW


def in_pieces(tensors: Tensors, sizes: Sequence[int] | None = None) -> Tensors:
    """Splits tensors on one device into views that torch processes on one thread each.

    Args:
        tensors: The tensors.
        sizes: Number of elements of each, if known. Default: None.

    Returns:
        The views. The tensors themselves if all are small, if they are not `few`, or if they are
        not on a CPU. A tensor whose strides leave holes is not split.
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
    by_stride = in_memory_order(t)
    return by_stride.view(-1).split(GRAIN) if by_stride.is_contiguous() else (t,)
