"""Cuts the gradients of a bucket into chunks, on the host, with numpy, independently of addresses.

A *stretch* is contiguous memory: one tensor, one run of a flat bucket, or consecutive tensors of
the list that are adjacent views of one buffer (as DDP creates them). Tensors that are adjacent by
chance are not joined, since the order of summation would then depend on the allocator.

A *chunk* is the unit of work of a program: at most `MAX_CHUNK` elements of a stretch, beginning at
an address divisible by 16, so that every load is 128 bits wide; the few elements before such an
address form a separate chunk. A *piece* is one tensor within a stretch.

The cut depends on sizes, on the positions of tensors within their stretches, and on the alignment
of the stretches, but not on their addresses. `Places` holds this information; equal `Places` give
equal cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# elements; chunk sizes are multiples of this number, so that all chunks but the head are aligned
MIN_CHUNK = 4096
MAX_CHUNK = 65536
# number of elements that a program could read while it waits for the row of the next chunk
CHUNK_COST = 1024
MIN_ROUNDS = 4  # chunks per program, if there are enough elements
ALIGNMENT = 16  # bytes of one vector load


@dataclass(slots=True, eq=False)
class Places:
    """The positions of the tensors of a bucket relative to their stretches.

    Attributes:
        item: Bytes per element.
        elements: int64 `(n,)`: number of elements of each tensor.
        stretch: int64 `(n,)`: stretch of each tensor; arbitrary for an empty tensor.
        first_byte: int64 `(n,)`: first byte of each tensor in its stretch.
        base: int64 `(B,)`: address of each stretch.
        length: int64 `(B,)`: number of elements of each stretch.
    """

    item: int
    elements: np.ndarray
    stretch: np.ndarray
    first_byte: np.ndarray
    base: np.ndarray
    length: np.ndarray

    def key(self) -> tuple[object, ...]:
        """Returns the inputs of the cut other than the sizes and segments of the tensors."""
        alignment = (self.base & (ALIGNMENT - 1)).astype(np.uint8).tobytes()
        if self.length is self.elements:  # each tensor is a stretch
            return (alignment,)
        return (
            self.stretch.tobytes(),
            self.first_byte.tobytes(),
            alignment,
            self.length.tobytes(),
        )


def places_of_tensors(
    address: np.ndarray,
    n: np.ndarray,
    segment: np.ndarray,
    buffers: Callable[[], np.ndarray],
    item: int,
) -> Places:
    """Returns the places of separate tensors; adjacent views of one buffer share a stretch.

    Args:
        address, n, segment: int64: address, number of elements and segment of each tensor.
        buffers: Returns int64: the address of the storage of each tensor. Called only if some
            tensors are adjacent.
        item: Bytes per element.
    """
    if n.all():
        end = address + n * item
        if not ((end[:-1] == address[1:]).any() or (end[1:] == address[:-1]).any()):
            return Places(item, n, np.arange(len(n)), np.zeros_like(address), address, n)
    starts = np.ones(len(n), dtype=bool)  # whether a tensor begins a stretch
    some = np.flatnonzero(n > 0)
    starts[some] = _first_of_neighbors(address, n, segment, buffers, some, item)
    starts[n == 0] = False
    first = np.flatnonzero(starts)
    stretch = np.maximum(np.cumsum(starts) - 1, 0)
    if not len(first):
        nothing = np.zeros(0, dtype=np.int64)
        return Places(item, n, stretch, np.zeros_like(address), nothing, nothing)
    held = np.where(n > 0, address, np.iinfo(np.int64).max)
    base = np.minimum.reduceat(held, first)
    first_byte = np.where(n > 0, address - base[stretch], 0)
    return Places(item, n, stretch, first_byte, base, np.add.reduceat(n, first))


def places_in_runs(
    address: np.ndarray, n: np.ndarray, base: np.ndarray, length: np.ndarray, item: int
) -> Places:
    """Returns the places of tensors in the runs of a flat bucket.

    Args:
        address, n: int64: address and number of elements of each tensor.
        base, length: int64: address and number of elements of each run.
        item: Bytes per element.
    """
    order = np.argsort(base, kind="stable")
    stretch = order[np.maximum(np.searchsorted(base[order], address, side="right") - 1, 0)]
    return Places(item, n, stretch, np.where(n > 0, address - base[stretch], 0), base, length)


def _first_of_neighbors(
    address: np.ndarray,
    n: np.ndarray,
    segment: np.ndarray,
    buffers: Callable[[], np.ndarray],
    some: np.ndarray,
    item: int,
) -> np.ndarray:
    """Returns which of `some` tensors begin a stretch, bool; others continue the previous one.

    A stretch may go in either direction: DDP lays out its buckets in reverse parameter order.
    """
    begin = address[some]
    end = begin + n[some] * item
    upward, downward = end[:-1] == begin[1:], end[1:] == begin[:-1]
    direction = np.where(upward, 1, np.where(downward, 2, 0))
    if not direction.any():
        return np.ones(len(some), dtype=bool)
    segment, buffer = segment[some], buffers()[some]
    direction *= (segment[:-1] == segment[1:]) & (buffer[:-1] == buffer[1:])
    turns = np.concatenate([[False], (direction[1:] != direction[:-1]) & (direction[:-1] > 0)])
    return np.concatenate([[True], (direction == 0) | turns])


def cut(
    places: Places,
    segments: np.ndarray,
    tensor_ids: np.ndarray,
    n_segments: int,
    n_programs: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns chunks, pieces and starts; see `chunks`.

    Args:
        places: The places of the tensors.
        segments: int64 `(B,)`: segment of each stretch.
        tensor_ids: int64 `(n,)`: index of each tensor in the caller's list.
        n_segments: S.
        n_programs: Number of programs that share the chunks.
    """
    by_place = np.lexsort((places.first_byte, places.stretch))
    by_place = by_place[places.elements[by_place] > 0]
    pieces = np.stack([places.first_byte, places.elements, tensor_ids], axis=1)[by_place]

    n = int(places.length.sum())
    order = np.argsort(segments, kind="stable")
    order = order[places.length[order] > 0]
    if not n:
        return np.zeros((0, 6), dtype=np.int64), pieces, np.zeros(n_segments + 1, dtype=np.int64)
    size = chunk_size(n, n_programs)
    owner, first, length = _cut(places.base[order], places.length[order], places.item, size)
    stretch = order[owner]
    first_piece, last = _pieces_between(
        places, by_place, stretch, first * places.item, (first + length) * places.item
    )
    columns = [stretch, first * places.item, length, segments[stretch], first_piece]
    chunks = np.stack([*columns, last - first_piece], axis=1)
    return chunks, pieces, np.searchsorted(chunks[:, 3], np.arange(n_segments + 1), side="left")


def _pieces_between(
    places: Places, by_place: np.ndarray, stretch: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces [first, last) in bytes [begin, end) of stretches."""
    # All stretches are laid out one after another on a single number line.
    origin = np.cumsum(places.length) - places.length
    at = origin[places.stretch[by_place]] * places.item + places.first_byte[by_place]
    until = at + places.elements[by_place] * places.item
    shift = origin[stretch] * places.item
    first = np.searchsorted(until, shift + begin, side="right")
    return first, np.searchsorted(at, shift + end, side="left")


def chunk_size(n_elements: int, n_programs: int) -> int:
    """Returns the number of elements per chunk for which the programs finish at similar times.

    Program k reads chunks k, k + P, and so on. The last round takes as long as any other round,
    even if only a few programs have a chunk left. For example, 512 MB of fp32 in chunks of 65536
    are 5.2 rounds for 396 programs, which take as long as 6 rounds; in chunks of 57344 they are 5.9
    rounds. The cost of a round, its elements plus `CHUNK_COST`, is a prediction that was not
    measured on a GPU.
    """
    sizes = range(MIN_CHUNK, MAX_CHUNK + 1, MIN_CHUNK)

    def rounds(size: int) -> int:
        return math.ceil(math.ceil(n_elements / size) / n_programs)

    enough = [size for size in sizes if rounds(size) >= MIN_ROUNDS] or [MIN_CHUNK]
    return min(enough, key=lambda size: rounds(size) * (size + CHUNK_COST))


def _cut(
    base: np.ndarray, n: np.ndarray, item: int, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns stretch, first element and size of each chunk.

    If a stretch is unaligned, its first chunk is the head up to the first aligned address.
    """
    head = np.minimum((-base % ALIGNMENT) // item, n)
    has_head = (head > 0).astype(np.int64)
    count = -(-(n - head) // chunk) + has_head
    owner = np.repeat(np.arange(len(n)), count)
    # an index of -1 is the head
    index = np.arange(len(owner)) - (np.cumsum(count) - count + has_head)[owner]
    first = np.where(index < 0, 0, head[owner] + index * chunk)
    length = np.where(index < 0, head[owner], np.minimum(chunk, n[owner] - first))
    return owner, first, length


def overlapping(address: np.ndarray, size: np.ndarray) -> Sequence[int]:
    """Returns the positions of tensors that overlap a tensor with a lower address.

    Args:
        address: int64: address of each tensor.
        size: int64: bytes of each tensor; 0 to ignore it.
    """
    order = np.argsort(address, kind="stable")
    if not size.all():
        order = order[size[order] > 0]
    begin = address[order]
    end = begin + size[order]
    if (begin[1:] >= end[:-1]).all():  # sorted, so any overlap is also one of neighbors
        return ()
    return order[1:][begin[1:] < np.maximum.accumulate(end)[:-1]].tolist()
