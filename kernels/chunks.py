"""The chunk table: where the gradients of a bucket lie, cut into pieces of equal work.

    chunks  int64 (C, 5): address, elements, segment, first piece, pieces     sorted by segment
    pieces  int64 (M, 3): address, elements, tensor id                        sorted by address
    starts  int64 (S + 1,): chunks [starts[s], starts[s + 1]) belong to segment s

A *chunk* is what a program reads in one go: at most `MAX_CHUNK` elements at an address divisible by
16, so that every load is one of 128 bits; the few elements in front of such an address are a chunk
of their own. A *piece* is one tensor: where a chunk holds several (a flat bucket, the buffers of
DDP), its pieces say which element belongs to which. Neighbours are joined only if they are views of
one buffer: what merely happens to lie side by side would make the order of summation depend on the
allocator.

Cost: a table is built with numpy (about 2 µs a tensor) and uploaded from pinned memory, both only
when an address, a size or a segment changed since the last `TABLES` different lists of gradients;
otherwise the host reads the address of each gradient (0.06 µs a tensor), and its size and strides
(0.1 µs) unless the form of the list is known (`fastguard.gradients.layout_guards`). A flat bucket
outlives the step and keeps its table: its slots never move.

A gradient that does not cover one block of memory (strides with holes, expanded, overlapping an
earlier one) has a contiguous buffer here that stands for it; the caller copies, and counts it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.upload import Upload, upload

MIN_CHUNK = 4096  # elements, and what sizes are multiples of: all chunks but a head stay aligned
MAX_CHUNK = 65536
CHUNK_COST = 1024  # elements that a program could read while it waits for the next chunk's row
FEWEST_ROUNDS = 4  # chunks for each program, where there are elements enough
ALIGNMENT = 16  # bytes of one vector load
TABLES = 8  # kept for each (device, dtype): sets of None gradients and allocators alternate


class Run(Protocol):
    @property
    def flat(self) -> Tensor: ...
    @property
    def segment(self) -> int: ...


class Memo(Protocol):
    tables: dict[int, Any]


class Bucket(Protocol):
    """What a table is made of; see `fastguard.gradients.buckets.GradBucket`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def grads(self) -> list[Tensor]: ...
    @property
    def tensor_ids(self) -> Sequence[int]: ...
    @property
    def segment_ids(self) -> Sequence[int]: ...
    @property
    def runs(self) -> Sequence[Run] | None: ...
    @property
    def memo(self) -> Memo: ...
    @property
    def form(self) -> object | None: ...
    @property
    def segment(self) -> int | None: ...


@dataclass(slots=True, eq=False)
class ChunkTable:
    """One table, on the device of its gradients.

    Attributes:
        upload: int64: chunks, pieces and starts one after another, in one copy.
        n_chunks: C; 0 if there is no element.
        copies: `(position in bucket.grads, contiguous buffer)` of gradients that stand elsewhere.
        key: What the table was built from.
    """

    upload: Upload
    chunks: Tensor
    pieces: Tensor
    starts: Tensor
    n_chunks: int
    copies: tuple[tuple[int, Tensor], ...]
    key: tuple


# Tuples are replaced, never changed: other threads may be reading them.
_tables: dict[tuple[torch.device, torch.dtype, int], tuple[ChunkTable, ...]] = {}
_lock = threading.Lock()


def table_of(bucket: Bucket, n_segments: int, n_programs: int) -> ChunkTable:
    """The table of a bucket, from the cache if nothing has moved. Waits for nothing.

    Args:
        bucket: The gradients, at least one.
        n_segments: S.
        n_programs: How many programs will share the chunks; small models get smaller chunks. Always
            the same on a device: all launches share one table, and the order of its sums.
    """
    table = bucket.memo.tables.get(n_segments)
    if table is None:
        table = _found_or_built(bucket, n_segments, n_programs)
        # One that a graph uploads serves no later step; a flat bucket, which lives on, has one
        # built for each stage.
        if bucket.runs is None or table.upload.is_lasting:
            bucket.memo.tables[n_segments] = table
    elif bucket.runs is None:
        return table  # apply comes after measure, on the same stream: nothing has moved since
    table.upload.await_on_stream()
    return table


def _found_or_built(bucket: Bucket, n_segments: int, n_programs: int) -> ChunkTable:
    kind = (bucket.device, bucket.dtype, n_segments)
    key = _key(bucket)
    for table in _tables.get(kind, ()):
        if table.key == key:
            return table
    table = _built(bucket, key, n_segments, n_programs)
    if table.upload.is_lasting:
        with _lock:  # two threads that add at once lose neither
            _tables[kind] = (table, *_tables.get(kind, ())[: TABLES - 1])
    return table


def _key(bucket: Bucket) -> tuple:
    """All that a table depends on; equal keys, equal tables."""
    segment = bucket.segment
    return (
        list(map(Tensor.data_ptr, bucket.grads)),
        bucket.form or _sizes_and_strides(bucket.grads),
        bucket.tensor_ids,
        bucket.segment_ids if segment is None or bucket.runs is not None else segment,
        None if bucket.runs is None else [(r.flat.data_ptr(), r.flat.numel()) for r in bucket.runs],
    )


def _sizes_and_strides(grads: list[Tensor]) -> tuple:
    strides = None
    if not all(map(Tensor.is_contiguous, grads)):
        strides = [None if g.is_contiguous() else g.stride() for g in grads]
    return list(map(Tensor.numel, grads)), strides


def _built(bucket: Bucket, key: tuple, n_segments: int, n_programs: int) -> ChunkTable:
    chunks, pieces, starts, copies = host_table(bucket, n_segments, n_programs)
    flat = np.concatenate([chunks.ravel(), pieces.ravel(), starts])
    uploaded = upload(flat, bucket.device, tuple(buffer for _, buffer in copies))
    memory, end = uploaded.memory, chunks.size + pieces.size
    return ChunkTable(
        upload=uploaded,
        chunks=memory[: chunks.size],
        pieces=memory[chunks.size : end],
        starts=memory[end:],
        n_chunks=len(chunks),
        copies=copies,
        key=key,
    )


def host_table(
    bucket: Bucket, n_segments: int, n_programs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[tuple[int, Tensor], ...]]:
    """Chunks, pieces, starts and copies of a bucket, on the host."""
    item = bucket.dtype.itemsize
    tensors, copies = bucket.grads, ()
    if bucket.runs is None:
        tensors, copies = _blocks_of_memory(bucket.grads)
    address = np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)
    n = np.array(list(map(Tensor.numel, tensors)), dtype=np.int64)
    segment = np.array(bucket.segment_ids[:], dtype=np.int64)  # type: ignore[index]
    tensor_id = np.array(bucket.tensor_ids, dtype=np.int64)

    by_address = np.argsort(address, kind="stable")
    by_address = by_address[n[by_address] > 0]
    pieces = np.stack([address, n, tensor_id], axis=1)[by_address]

    if bucket.runs is None:
        offset = np.array(list(map(Tensor.storage_offset, tensors)), dtype=np.int64)
        address, n, segment = _joined(address, n, segment, address - offset * item, item)
    else:
        address = np.array([r.flat.data_ptr() for r in bucket.runs], dtype=np.int64)
        n = np.array([r.flat.numel() for r in bucket.runs], dtype=np.int64)
        segment = np.array([r.segment for r in bucket.runs], dtype=np.int64)
    order = np.argsort(segment, kind="stable")
    address, n, segment = address[order], n[order], segment[order]

    chunks = np.zeros((0, 5), dtype=np.int64)
    if n.sum():
        where, length, owner = _cut(address, n, item, chunk_size(int(n.sum()), n_programs))
        first = np.searchsorted(pieces[:, 0] + pieces[:, 1] * item, where, side="right")
        last = np.searchsorted(pieces[:, 0], where + length * item, side="left")
        chunks = np.stack([where, length, segment[owner], first, last - first], axis=1)
    starts = np.searchsorted(chunks[:, 2], np.arange(n_segments + 1), side="left")
    return chunks, pieces, starts, copies


def chunk_size(n_elements: int, n_programs: int) -> int:
    """Elements a chunk, so that all programs finish together.

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
    address: np.ndarray, n: np.ndarray, item: int, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Address, elements and owner of each chunk: an unaligned head, if any, then the body."""
    head = np.minimum((-address % ALIGNMENT) // item, n)
    has_head = (head > 0).astype(np.int64)
    count = -(-(n - head) // chunk) + has_head
    owner = np.repeat(np.arange(len(n)), count)
    index = np.arange(len(owner)) - (np.cumsum(count) - count + has_head)[owner]  # -1: the head
    offset = np.where(index < 0, 0, head[owner] + index * chunk)
    length = np.where(index < 0, head[owner], np.minimum(chunk, n[owner] - offset))
    return address[owner] + offset * item, length, owner


def _joined(
    address: np.ndarray, n: np.ndarray, segment: np.ndarray, buffer: np.ndarray, item: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes one stretch of list neighbours that are adjacent views of one buffer.

    In either direction: DDP lays its buckets out in the reverse order of the parameters."""
    some = n > 0
    address, n, segment, buffer = address[some], n[some], segment[some], buffer[some]
    if len(n) < 2:
        return address, n, segment
    end = address + n * item
    upward, downward = end[:-1] == address[1:], end[1:] == address[:-1]
    direction = np.where(upward, 1, np.where(downward, 2, 0))
    direction *= (segment[:-1] == segment[1:]) & (buffer[:-1] == buffer[1:])
    turns = np.concatenate([[False], (direction[1:] != direction[:-1]) & (direction[:-1] > 0)])
    first = np.flatnonzero(np.concatenate([[True], (direction == 0) | turns]))
    return np.minimum.reduceat(address, first), np.add.reduceat(n, first), segment[first]


def _blocks_of_memory(grads: list[Tensor]) -> tuple[list[Tensor], tuple[tuple[int, Tensor], ...]]:
    """The gradients, with a contiguous buffer in place of each that is not one block of memory."""
    size = np.array([g.nbytes if is_dense(g) else 0 for g in grads], dtype=np.int64)
    copied = {i for i, g in enumerate(grads) if not size[i] and g.numel()}
    address = np.array(list(map(Tensor.data_ptr, grads)), dtype=np.int64)
    order = np.argsort(address, kind="stable")
    order = order[size[order] > 0]
    reached = np.maximum.accumulate((address + size)[order])[:-1]
    copied.update(order[1:][address[order[1:]] < reached].tolist())  # part of it came before
    if not copied:
        return grads, ()
    buffers = {
        i: torch.empty_like(grads[i], memory_format=torch.contiguous_format) for i in sorted(copied)
    }
    return [buffers.get(i, g) for i, g in enumerate(grads)], tuple(buffers.items())


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
