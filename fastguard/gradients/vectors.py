"""Tensors as vectors, in memory order, of lengths that suit a CPU.

A call of torch takes as long as reading 10 kB. torch splits an operation on 32,768 or more elements
among its threads; MKL splits a dot product of any length. If the cores are idle, two threads take
half the time. If other processes, such as data workers, keep them busy, the operation waits until
the scheduler gives each thread a core: 10 to 50 ms for an operation that takes 20 µs [2 cores, 2
busy processes]. Therefore

* small tensors, however many, are concatenated into vectors that one thread reads, just as torch
  reads a single small tensor on one thread (`gathered`);
* large tensors with fewer than `FEW` elements in total are processed in pieces, on one thread
  (`in_pieces`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import lasting

Tensors = list[Tensor] | tuple[Tensor, ...]  # the types that torch's foreach functions accept

DOT = 2**13  # elements per dot product; OpenBLAS uses one thread for up to 10,000
GRAIN = 2**15 - 16  # elements per piece; whole cache lines, below torch's limit of 32,768
FEW = 2**20  # elements; with fewer, a second thread saves less than 0.2 ms
ALIGN = 16  # elements; makes a float32 vector start at a cache line
_local = threading.local()
# Flattens and concatenates without a Python object per tensor.
flattened = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]


def in_memory_order(t: Tensor) -> Tensor:
    """Returns the elements of a dense tensor as a vector in memory order, a view.

    Raises:
        RuntimeError: The memory of the tensor has gaps, so that no such view exists.
    """
    return (t if t.is_contiguous() else _by_stride(t)).view(-1)


def flat(t: Tensor) -> Tensor:
    """Returns the elements of a tensor as a vector, in memory order to avoid a copy if possible."""
    if t.dim() == 1:
        return t
    return (t if t.is_contiguous() else _by_stride(t)).reshape(-1)


def _by_stride(t: Tensor) -> Tensor:
    """Returns a view with descending strides; contiguous if the tensor is dense."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def few(sizes: Iterable[int]) -> bool:
    """Whether tensors of these sizes should be processed on one thread.

    True if the tensors larger than `GRAIN` have fewer than `FEW` elements in total.
    """
    return sum(n for n in sizes if n > GRAIN) < FEW


def in_pieces(tensors: Tensors, sizes: Sequence[int] | None = None) -> Tensors:
    """Splits tensors on one device into views that torch processes on one thread each.

    Args:
        tensors: The tensors.
        sizes: Number of elements of each tensor, if known. Default: None.

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
    by_stride = _by_stride(t)
    return by_stride.view(-1).split(GRAIN) if by_stride.is_contiguous() else (t,)


def gathered(
    tensors: Sequence[Tensor],
    limit: int,
    sizes: Sequence[int] | None = None,
    *,
    joined: int = GRAIN,
) -> Iterator[tuple[Tensor, int, int]]:
    """Yields vectors of at most `limit` elements that together hold all tensors, in order.

    Args:
        tensors: CPU tensors of one dtype, with any strides.
        limit: Maximum number of elements of a vector.
        sizes: Number of elements of each tensor, if already known.
        joined: Maximum number of elements of a vector that holds several tensors. Default: what a
            single thread reads.

    Yields:
        `(values, start, stop)`: the concatenated elements of `tensors[start:stop]`. A tensor longer
        than `limit` is yielded in pieces; a single tensor is not copied.
    """
    if sizes is None:
        sizes = list(map(Tensor.numel, tensors))
    if max(sizes, default=0) > GRAIN:  # torch would concatenate larger tensors with several threads
        joined = min(joined, GRAIN)
    joined = min(joined, limit)
    if 0 < sum(sizes) <= joined:
        yield concatenated(tensors), 0, len(tensors)
        return
    ends = np.cumsum(sizes, dtype=np.int64)
    start, before = 0, 0
    while start < len(tensors):
        stop = max(start + 1, int(ends.searchsorted(before + joined, side="right")))
        n = int(ends[stop - 1]) - before
        if stop - start > 1:
            if n:
                yield concatenated(tensors[start:stop]), start, stop
        elif n:
            for piece in flat(tensors[start]).split(limit):
                yield piece, start, stop
        start, before = stop, int(ends[stop - 1])


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the elements of some tensors as a vector; does not copy a single tensor."""
    if len(tensors) == 1:
        return flat(tensors[0])
    # checking all tensors would take half the time of `cat`
    if tensors[0].dim() == 1 == tensors[-1].dim():
        try:
            # three times as fast for thousands of tensors
            return torch.cat(list(tensors)).reshape(-1)
        except RuntimeError:  # not all tensors are vectors
            pass
    return flattened(list(tensors))


def buffer(name: str, n: int, most: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a working buffer of this thread, allocated once per name.

    Allocating new pages would cost more than reading the data. The buffer is a slice around the
    middle of the allocation, so that two threads that split it in half write to the same addresses
    in each call. Otherwise a thread would write to memory in the cache of the other core; without a
    shared last-level cache, fetching that memory takes as long as all other work.

    Args:
        name: Key of the buffer; a later call with the same name overwrites its contents.
        n: Size of the first dimension.
        most: The maximum shape. Both `most` and `dtype` must always be the same for a name.
        dtype: The dtype of the elements.

    Returns:
        A contiguous tensor `(n, *most[1:])`, uninitialized.
    """
    kept = getattr(_local, name, None)
    if kept is not None and kept[1].shape[0] == n:
        # the size is the same as in the last step; a new slice would cost 15 µs with cold caches
        return kept[1]
    with lasting():
        whole = torch.empty(most, dtype=dtype, device="cpu") if kept is None else kept[0]
        first = (most[0] - n) // 2
        part = whole[first - first % ALIGN :][:n]
    setattr(_local, name, (whole, part))
    return part


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
