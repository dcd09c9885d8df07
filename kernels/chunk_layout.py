"""How the gradients of a bucket are cut into chunks: on the host, with numpy, without an address.

A *stretch* is memory that is read in one go: one tensor, one run of a flat bucket, or list
neighbours that are adjacent views of one buffer (as DDP makes them). What merely happens to lie
side by side is not joined: the order of summation would depend on the allocator.

A *chunk* is what a program reads at a time: at most `MAX_CHUNK` elements of a stretch, at an
address divisible by 16, so that every load is one of 128 bits; the few elements in front of such an
address are a chunk of their own. A *piece* is one tensor inside a stretch.

All of this depends on sizes, on how tensors lie within their stretches, and on the alignment of the
stretches, but not on where they are: `Places` holds exactly that much, and equal places are cut
alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_CHUNK = 4096  # elements, and what sizes are multiples of: all chunks but a head stay aligned
MAX_CHUNK = 65536
CHUNK_COST = 1024  # elements that a program could read while it waits for the next chunk's row
FEWEST_ROUNDS = 4  # chunks for each program, where there are elements enough
ALIGNMENT = 16  # bytes of one vector load


@dataclass(slots=True, eq=False)
class Places:
    """Where the tensors of a bucket lie, relative to the stretches that hold them.

    Attributes:
        item: Bytes of an element.
        elements: int64 `(n,)`: the size of each tensor.
        stretch: int64 `(n,)`: the stretch of each tensor; of an empty tensor, any.
        first_byte: int64 `(n,)`: of each tensor in its stretch.
        base: int64 `(B,)`: the address of each stretch.
        length: int64 `(B,)`: elements of each stretch.
    """

    item: int
    elements: np.ndarray
    stretch: np.ndarray
    first_byte: np.ndarray
    base: np.ndarray
    length: np.ndarray

    def key(self) -> tuple[object, ...]:
        """What the cut depends on, beside the sizes of the tensors and their segments."""
        return (
            self.stretch.tobytes(),
            self.first_byte.tobytes(),
            (self.base % ALIGNMENT).astype(np.uint8).tobytes(),
            self.length.tobytes(),
        )


def places_of_tensors(
    address: np.ndarray,
    n: np.ndarray,
    segment: np.ndarray,
    buffers: Callable[[], np.ndarray],
    item: int,
) -> Places:
    """The places of separate tensors; adjacent views of one buffer share a stretch.

    Args:
        address, n, segment: int64, of each tensor: its address, its size, its segment.
        buffers: Gives int64: the address of the memory that each is a view of. Asked for only
            where tensors are adjacent.
        item: Bytes of an element.
    """
    starts = np.ones(len(n), dtype=bool)  # whether a tensor begins a stretch
    some = np.flatnonzero(n > 0)
    starts[some] = _first_of_neighbours(address, n, segment, buffers, some, item)
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
    """The places of tensors inside the runs of a flat bucket.

    Args:
        address, n: int64, of each tensor.
        base, length: int64, of each run: its address and its elements.
        item: Bytes of an element.
    """
    order = np.argsort(base, kind="stable")
    stretch = order[np.maximum(np.searchsorted(base[order], address, side="right") - 1, 0)]
    return Places(item, n, stretch, np.where(n > 0, address - base[stretch], 0), base, length)


def _first_of_neighbours(
    address: np.ndarray,
    n: np.ndarray,
    segment: np.ndarray,
    buffers: Callable[[], np.ndarray],
    some: np.ndarray,
    item: int,
) -> np.ndarray:
    """bool: which of `some` tensors begin a stretch; the others continue that of the one before.

    In either direction: DDP lays its buckets out in the reverse order of the parameters."""
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
    """Chunks, pieces and starts: see `chunks`.

    Args:
        places: Where the tensors lie.
        segments: int64 `(B,)`: the segment of each stretch.
        tensor_ids: int64 `(n,)`: the index of each tensor in the caller's list.
        n_segments: S.
        n_programs: How many programs will share the chunks.
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
    """The pieces [first, last) that lie in bytes [begin, end) of stretches."""
    # One number line for all stretches, one after another.
    origin = np.cumsum(places.length) - places.length
    at = origin[places.stretch[by_place]] * places.item + places.first_byte[by_place]
    until = at + places.elements[by_place] * places.item
    shift = origin[stretch] * places.item
    first = np.searchsorted(until, shift + begin, side="right")
    return first, np.searchsorted(at, shift + end, side="left")


def chunk_size(n_elements: int, n_programs: int) -> int:
    """Elements per chunk, so that all programs finish together.

    Program k reads chunks k, k + P, ...: the last round is as long as the others, however few
    programs have work in it. 512 MB of fp32 in chunks of 65536 are 5.2 rounds for 396 programs, so
    that 6 pass; in chunks of 57344 they are 5.9. That a round costs its elements and those of
    `CHUNK_COST` is a prediction that no card has confirmed.
    """
    sizes = range(MIN_CHUNK, MAX_CHUNK + 1, MIN_CHUNK)

    def rounds(size: int) -> int:
        return math.ceil(math.ceil(n_elements / size) / n_programs)

    enough = [size for size in sizes if rounds(size) >= FEWEST_ROUNDS] or [MIN_CHUNK]
    return min(enough, key=lambda size: rounds(size) * (size + CHUNK_COST))


def _cut(
    base: np.ndarray, n: np.ndarray, item: int, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretch, first element and size of each chunk: an unaligned head, if any, then the body."""
    head = np.minimum((-base % ALIGNMENT) // item, n)
    has_head = (head > 0).astype(np.int64)
    count = -(-(n - head) // chunk) + has_head
    owner = np.repeat(np.arange(len(n)), count)
    index = np.arange(len(owner)) - (np.cumsum(count) - count + has_head)[owner]  # -1: the head
    first = np.where(index < 0, 0, head[owner] + index * chunk)
    length = np.where(index < 0, head[owner], np.minimum(chunk, n[owner] - first))
    return owner, first, length


def overlapping(address: np.ndarray, size: np.ndarray) -> Sequence[int]:
    """The positions of tensors of which a part lies in one that begins before them.

    Args:
        address: int64, of each tensor.
        size: int64, bytes of each tensor; 0 to leave it out.
    """
    order = np.argsort(address, kind="stable")
    order = order[size[order] > 0]
    reached = np.maximum.accumulate((address + size)[order])[:-1]
    return order[1:][address[order[1:]] < reached].tolist()
