"""Gathers many CPU tensors into few vectors, since a torch call takes as long as reading 10 kB."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.cpu_threads import GRAIN
from fastguard.gradients.memory_order import flat
from fastguard.gradients.tensor_kinds import lasting

ALIGN = 16  # elements: a float32 vector starts at a cache line
_local = threading.local()
# Flattens and concatenates without a Python object per tensor.
flattened = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]


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
    if max(sizes, default=0) > GRAIN:  # torch would concatenate it with several threads
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
    """Returns the elements of some tensors as a vector; of a single tensor, without a copy."""
    if len(tensors) == 1:
        return flat(tensors[0])
    if tensors[0].dim() == 1 == tensors[-1].dim():  # checking all would take half the time of cat
        try:
            return torch.cat(list(tensors)).reshape(-1)  # 3x as fast for thousands of tensors
        except RuntimeError:  # not all are vectors
            pass
    return flattened(list(tensors))


def buffer(name: str, n: int, most: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a working buffer of this thread, allocated once per name.

    Allocating new pages would cost more than reading the data. The buffer is a slice around the
    middle of the allocation, so that two threads that split it in half write to the same addresses
    in each call. Otherwise a thread would write to memory in the cache of the other core; without a
    shared last-level cache, fetching it takes as long as everything else together.

    Args:
        name: Key of the buffer; a later call with the same name overwrites its contents.
        n: Size of the first dimension.
        most: Its maximum shape; must always be the same for a name, as must `dtype`.
        dtype: The dtype of the elements.

    Returns:
        A contiguous tensor `(n, *most[1:])`, uninitialized.
    """
    kept = getattr(_local, name, None)
    if kept is not None and kept[1].shape[0] == n:
        return kept[1]  # same size as in the last step: a new slice costs 15 µs with cold caches
    with lasting():
        whole = torch.empty(most, dtype=dtype, device="cpu") if kept is None else kept[0]
        first = (most[0] - n) // 2
        part = whole[first - first % ALIGN :][:n]
    setattr(_local, name, (whole, part))
    return part
