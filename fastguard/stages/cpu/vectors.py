"""Many CPU tensors as few vectors, because a call of torch costs as much as reading 10 kB."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.cpu_threads import GRAIN
from fastguard.gradients.tensor_kinds import lasting

ALIGN = 16  # elements, so that also a float32 vector begins with a cache line
_local = threading.local()
# Flattens and joins without a Python object for each tensor.
flattened = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]


def flat(t: Tensor) -> Tensor:
    """A tensor as a vector, in whatever order lets it stay where it is."""
    if t.dim() == 1:
        return t
    if not t.is_contiguous():  # channels_last, say
        t = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return t.reshape(-1)


def gathered(
    tensors: Sequence[Tensor],
    limit: int,
    sizes: Sequence[int] | None = None,
    *,
    joined: int = GRAIN,
) -> Iterator[tuple[Tensor, int, int]]:
    """Vectors of at most `limit` elements that together hold all tensors of one dtype, in order.

    Args:
        tensors: CPU tensors of any strides.
        limit: Elements of a vector.
        sizes: How many elements each has, if that is known already.
        joined: Elements of a vector of several tensors; by default what one thread reads.

    Yields:
        `(values, start, stop)`: the elements of `tensors[start:stop]` one after the other; of a
        tensor longer than the limit a piece at a time. One tensor that fits stays where it is.
    """
    if sizes is None:
        sizes = list(map(Tensor.numel, tensors))
    if max(sizes, default=0) > GRAIN:  # several threads would join it to others
        joined = min(joined, GRAIN)
    joined = min(joined, limit)
    if 0 < sum(sizes) <= joined:
        yield _join(tensors), 0, len(tensors)
        return
    ends = np.cumsum(sizes, dtype=np.int64)
    start, before = 0, 0
    while start < len(tensors):
        stop = max(start + 1, int(ends.searchsorted(before + joined, side="right")))
        n = int(ends[stop - 1]) - before
        if stop - start > 1:
            if n:
                yield _join(tensors[start:stop]), start, stop
        elif n:
            for piece in flat(tensors[start]).split(limit):
                yield piece, start, stop
        start, before = stop, int(ends[stop - 1])


def _join(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return flat(tensors[0])
    if tensors[0].dim() == 1 == tensors[-1].dim():  # looking at all costs half as much as joining
        try:
            return torch.cat(list(tensors)).reshape(-1)  # three times as fast for thousands
        except RuntimeError:  # not all are vectors
            pass
    return flattened(list(tensors))


def buffer(name: str, n: int, most: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Working memory of this thread, made once: fresh pages cost more than the reading.

    Its middle is handed out. Two threads that share the work then meet where they met before, and
    each writes where it wrote before; what the other one wrote lies in the other's cache, and where
    cores do not share their last one, fetching it from there takes as long as everything else.

    Args:
        name: Whose memory: what one call returns a later one for the same name overwrites.
        n: How much of the first dimension.
        most: Its shape at the most; like `dtype` always the same for a name.

    Returns:
        `(n, *most[1:])`, contiguous.
    """
    kept = getattr(_local, name, None)
    if kept is not None and kept[1].shape[0] == n:
        return kept[1]  # as at the last step: a slice costs 15 µs when caches are cold
    with lasting():
        whole = torch.empty(most, dtype=dtype, device="cpu") if kept is None else kept[0]
        first = (most[0] - n) // 2
        part = whole[first - first % ALIGN :][:n]
    setattr(_local, name, (whole, part))
    return part
