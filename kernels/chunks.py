"""The chunk table: the addresses of the gradients of a bucket, cut into pieces of equal work.

    addresses  int64 (B,): of each stretch
    chunks     int64 (C, 6): stretch, first byte, elements, segment, first piece, pieces
    pieces     int64 (M, 3): first byte, elements, tensor id
    starts     int64 (S + 1,): chunks [starts[s], starts[s + 1]) belong to segment s

Chunks are sorted by segment, pieces by stretch and first byte; the columns are named in `columns`,
and stretch, chunk and piece are defined in `chunk_layout`. Everything except `addresses` is a
*layout*, which depends only on sizes and alignment. Allocators that return other addresses at each
step usually keep the alignment; then only the few addresses are uploaded.

Host time to build a table when the address of every gradient differs from the previous step [EPYC,
Python 3.11, medians of 24, interleaved, a loaded machine]. With separate addresses and layouts
("split"), the time does not depend on the number of chunks:

| gradients                         | chunks  | one table for both | split  | uploaded         |
|-----------------------------------|---------|--------------------|--------|------------------|
| llama-3-8b, bf16, 291 tensors     | 122,593 | 15.2 ms            | 0.15 ms| 4.9 MB -> 2.3 kB |
| gpt2-124m, fp32, 148 tensors      | 2,893   | 0.34 ms            | 0.13 ms| 120 kB -> 1.2 kB |
| 5000 x 100, fp32                  | 5,000   | 13 ms              | 2.2 ms | 320 kB -> 40 kB  |

Addresses and layouts are cached for the last `TABLES` different lists of gradients. To look them
up, the host reads the address of each gradient (0.06 µs), and its size and strides (0.1 µs) unless
the form of the list is known (`fastguard.gradients.layout_guards`). A flat bucket outlives the step
and keeps its table, since its slots never move.

A gradient that does not cover one block of memory (strides with holes, expanded, overlapping an
earlier one) is represented by a contiguous buffer; the caller copies it there, and counts it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels import chunk_layout
from fastguard.kernels.chunk_layout import Places, places_in_runs, places_of_tensors
from fastguard.kernels.upload import Upload, upload

# number of cached tables; steps may alternate between addresses, or between lists with None
TABLES = 8


class Run(Protocol):
    """Contiguous gradients of one segment; see `fastguard.gradients.buckets.Run`."""

    @property
    def flat(self) -> Tensor: ...
    @property
    def segment(self) -> int: ...


class Form(Protocol):
    """The layout of a list of gradients; see `fastguard.gradients.layout_guards.Form`."""

    @property
    def contiguous(self) -> bool: ...


class Memo(Protocol):
    """A cache with the lifetime of the bucket."""

    tables: dict[int, Any]


class Bucket(Protocol):
    """The input of a table; see `fastguard.gradients.buckets.GradBucket`."""

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
    def form(self) -> Form | None: ...
    @property
    def segment(self) -> int | None: ...
    @property
    def sizes(self) -> Sequence[int] | None: ...


@dataclass(slots=True, eq=False)
class Layout:
    """The cut of a bucket, on the device of its gradients.

    Attributes:
        upload: int64: concatenated chunks, pieces and starts, in one copy.
        chunks, pieces, starts: Views of the upload.
        n_chunks: C; 0 without elements.
        key: Everything that the layout depends on.
    """

    upload: Upload
    chunks: Tensor
    pieces: Tensor
    starts: Tensor
    n_chunks: int
    key: tuple[object, ...]


@dataclass(slots=True, eq=False)
class ChunkTable:
    """A layout and the addresses of its stretches, on the device of the gradients.

    Attributes:
        layout: The cut of the gradients.
        upload: The addresses.
        copies: `(position in bucket.grads, contiguous buffer)` of gradients that do not cover one
            block of memory.
        key: Everything that the table depends on.
    """

    layout: Layout
    upload: Upload
    copies: tuple[tuple[int, Tensor], ...]
    key: tuple[object, ...]

    @property
    def addresses(self) -> Tensor:
        """The addresses of the stretches, int64 `(B,)`."""
        return self.upload.memory

    @property
    def n_chunks(self) -> int:
        """C; 0 without elements."""
        return self.layout.n_chunks

    @property
    def is_lasting(self) -> bool:
        """Whether later steps may use the table; a table of a graph exists only in replays."""
        return self.upload.is_lasting and self.layout.upload.is_lasting

    def await_on_stream(self) -> None:
        """Orders the current stream of a GPU after the uploads, without blocking the host."""
        self.layout.upload.await_on_stream()
        self.upload.await_on_stream()


# Tuples are replaced, never changed, since other threads may be reading them.
_tables: dict[tuple[torch.device, torch.dtype, int], tuple[ChunkTable, ...]] = {}
_layouts: dict[tuple[torch.device, torch.dtype, int, int], tuple[Layout, ...]] = {}
_last_sizes: tuple[Sequence[int], np.ndarray] = (), np.zeros(0, np.int64)  # replaced as a whole
_lock = threading.Lock()


def table_of(bucket: Bucket, n_segments: int, n_programs: int) -> ChunkTable:
    """Returns the table of a bucket, from the cache if no address has changed, without a sync.

    Args:
        bucket: The gradients, at least one.
        n_segments: S.
        n_programs: Number of programs that share the chunks; small models get smaller chunks. It
            must be the same for all calls on a device, since all launches share one table, which
            also determines the order of summation.
    """
    table = bucket.memo.tables.get(n_segments)
    if table is None:
        table = _found_or_built(bucket, n_segments, n_programs)
        # Later steps cannot use a table that a graph uploads. The memo of a flat bucket outlives
        # the step, so such a table is not stored in the memo, but built again for each stage.
        if bucket.runs is None or table.is_lasting:
            bucket.memo.tables[n_segments] = table
    elif bucket.runs is None:
        return table  # apply runs after measure on the same stream, so no gradient has moved
    table.await_on_stream()
    return table


def _found_or_built(bucket: Bucket, n_segments: int, n_programs: int) -> ChunkTable:
    kind = (bucket.device, bucket.dtype, n_segments)
    key = _key(bucket)
    for table in _tables.get(kind, ()):
        if table.key == key:
            return table
    table = _built(bucket, key, n_segments, n_programs)
    if table.is_lasting:
        with _lock:  # the lock prevents the loss of concurrent additions
            _tables[kind] = (table, *_tables.get(kind, ())[: TABLES - 1])
    return table


def _key(bucket: Bucket) -> tuple[object, ...]:
    """Returns everything that a table depends on."""
    return (
        list(map(Tensor.data_ptr, bucket.grads)),
        None if bucket.runs is None else [r.flat.data_ptr() for r in bucket.runs],
        _shape(bucket),
    )


def _shape(bucket: Bucket) -> tuple[object, ...]:
    """Returns everything that a table depends on except addresses."""
    segment = bucket.segment
    return (
        bucket.form or _sizes_and_strides(bucket.grads),
        bucket.tensor_ids,
        bucket.segment_ids if segment is None or bucket.runs is not None else segment,
        None if bucket.runs is None else [(r.segment, r.flat.numel()) for r in bucket.runs],
    )


def _sizes_and_strides(grads: list[Tensor]) -> tuple[object, ...]:
    strides = None
    if not all(map(Tensor.is_contiguous, grads)):
        strides = [None if g.is_contiguous() else g.stride() for g in grads]
    return list(map(Tensor.numel, grads)), strides


def _built(bucket: Bucket, key: tuple, n_segments: int, n_programs: int) -> ChunkTable:
    places, copies = places_of(bucket, key[0])
    layout = _layout_of(bucket, (key[-1], places.key()), places, n_segments, n_programs)
    # A copy, which becomes the source for pinned memory, or on a CPU the table itself.
    addresses = np.array(places.base)
    uploaded = upload(addresses, bucket.device, tuple(buffer for _, buffer in copies))
    return ChunkTable(layout, uploaded, copies, key)


def _layout_of(
    bucket: Bucket, key: tuple, places: Places, n_segments: int, n_programs: int
) -> Layout:
    kind = (bucket.device, bucket.dtype, n_segments, n_programs)
    for layout in _layouts.get(kind, ()):
        if layout.key == key:
            return layout
    chunks, pieces, starts = cut(bucket, places, n_segments, n_programs)
    uploaded = upload(np.concatenate([chunks.ravel(), pieces.ravel(), starts]), bucket.device)
    memory, end = uploaded.memory, chunks.size + pieces.size
    layout = Layout(
        upload=uploaded,
        chunks=memory[: chunks.size],
        pieces=memory[chunks.size : end],
        starts=memory[end:],
        n_chunks=len(chunks),
        key=key,
    )
    if uploaded.is_lasting:
        with _lock:
            _layouts[kind] = (layout, *_layouts.get(kind, ())[: TABLES - 1])
    return layout


def cut(
    bucket: Bucket, places: Places, n_segments: int, n_programs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns chunks, pieces and starts of a bucket, on the host."""
    if bucket.runs is None:
        segments = np.zeros(len(places.base), dtype=np.int64)
        some = places.elements > 0  # all tensors of a stretch belong to the same segment
        segments[places.stretch[some]] = _segments(bucket)[some]
    else:
        segments = _int64([r.segment for r in bucket.runs])
    ids = _int64(bucket.tensor_ids)
    return chunk_layout.cut(places, segments, ids, n_segments, n_programs)


def places_of(
    bucket: Bucket, addresses: Sequence[int]
) -> tuple[Places, tuple[tuple[int, Tensor], ...]]:
    """Returns the places of the gradients of a bucket, and the `copies` of a `ChunkTable`.

    Args:
        bucket: The gradients.
        addresses: The address of each gradient.
    """
    item = bucket.dtype.itemsize
    n, address = _sizes(bucket), _int64(addresses)
    if bucket.runs is not None:
        base = _int64([r.flat.data_ptr() for r in bucket.runs])
        length = _int64([r.flat.numel() for r in bucket.runs])
        return places_in_runs(address, n, base, length, item), ()
    copies = _copies(bucket, address, n, item)
    tensors = bucket.grads
    if copies:
        standing = dict(copies)
        tensors = [standing.get(i, g) for i, g in enumerate(tensors)]
        address = _int64(list(map(Tensor.data_ptr, tensors)))

    def buffers() -> np.ndarray:
        return address - _int64(list(map(Tensor.storage_offset, tensors))) * item

    return places_of_tensors(address, n, _segments(bucket), buffers, item), copies


def _sizes(bucket: Bucket) -> np.ndarray:
    """Returns the number of elements of each gradient; converted once for a known form."""
    global _last_sizes
    sizes = bucket.sizes
    if sizes is None:
        return _int64(list(map(Tensor.numel, bucket.grads)))
    known, array = _last_sizes
    if sizes is not known:
        array = _int64(sizes)
        array.setflags(write=False)
        _last_sizes = sizes, array
    return array


def _segments(bucket: Bucket) -> np.ndarray:
    common = bucket.segment
    if common is None:
        return _int64(bucket.segment_ids)
    return np.full(len(bucket.grads), common, dtype=np.int64)


def _int64(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers[:], dtype=np.int64)


def _copies(
    bucket: Bucket, address: np.ndarray, n: np.ndarray, item: int
) -> tuple[tuple[int, Tensor], ...]:
    """Creates a contiguous buffer for each gradient that does not cover its own block of memory."""
    grads = bucket.grads
    if bucket.form is not None and bucket.form.contiguous:
        copied = set(chunk_layout.overlapping(address, n * item))
    else:
        dense = np.array(list(map(Tensor.is_contiguous, grads)), dtype=bool)
        for i in np.flatnonzero(~dense).tolist():
            dense[i] = is_dense(grads[i])
        copied = set(np.flatnonzero(~dense & (n > 0)).tolist())
        copied.update(chunk_layout.overlapping(address, n * item * dense))
    return tuple(
        (i, torch.empty_like(grads[i], memory_format=torch.contiguous_format))
        for i in sorted(copied)
    )


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill one block of memory, in any order."""
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
