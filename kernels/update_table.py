"""The table of an update: chunks of tensors, and the addresses of their arrays; see `update`.

As in `chunks`, the layout depends on sizes and alignment, and is cached. Addresses are uploaded
whenever they change; the addresses of gradients may change in each step. Arrays are cut at vector
boundaries, so that all chunks of an aligned tensor are aligned. Tensors with limited units are cut
between units, or within a long unit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.chunk_layout import chunk_size
from fastguard.kernels.chunks import TABLES
from fastguard.kernels.columns import (
    ADDRESS_COLUMNS,
    CHUNKS_COLUMN,
    COUNTER_COLUMN,
    FIRST_CHUNK_COLUMN,
    GROUP_COLUMN,
    MASTER,
    SIZE_COLUMN,
    STATE,
    STEP_ADDRESS,
    TENSOR_COLUMNS,
    UPDATE_COLUMNS,
    UPDATE_TENSOR,
)
from fastguard.kernels.upload import Upload, upload


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """The arrays of T tensors, their segments, groups and counters, and the units to clip.

    Attributes:
        weights, gradients: T dense tensors each, with equal strides.
        states: Up to three lists of T tensors.
        masters, steps: T tensors each, or empty.
        segment_ids, group_ids, counters: T numbers each; counters may be empty.
        vector: Elements per vector; see `update.vector_size`.
        rows: T numbers: the elements of a unit whose coefficient is computed in the update, or 0.
        long_rows: T numbers: the elements of a unit that has a separate segment, or 0; the units of
            a tensor have consecutive segments, from `segment_ids` on.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    masters: Sequence[Tensor]
    steps: Sequence[Tensor]
    segment_ids: Sequence[int]
    group_ids: Sequence[int]
    counters: Sequence[int]
    vector: int
    rows: Sequence[int] = ()
    long_rows: Sequence[int] = ()

    def columns(self) -> list[tuple[int, Sequence[Tensor]]]:
        """Returns the elementwise arrays with their address columns."""
        lists = [(0, self.weights), (1, self.gradients)]
        lists += [(STATE.value + i, state) for i, state in enumerate(self.states)]
        return [*lists, (MASTER.value, self.masters)] if self.masters else lists


@dataclass(frozen=True, slots=True, eq=False)
class UpdateLayout:
    """The part of the table that does not depend on addresses, on the device of the tensors.

    Attributes:
        upload: int64: concatenated chunks and tensors.
        chunks, tensors: Views of the upload.
        n_chunks: C.
        key: Everything that the layout depends on.
    """

    upload: Upload
    chunks: Tensor
    tensors: Tensor
    n_chunks: int
    key: tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class UpdateTable:
    """A layout and addresses, on the device of the tensors.

    Attributes:
        layout: The division of the tensors into chunks.
        upload: int64 `(T, 8)`: the addresses.
        key: Everything that the table depends on.
    """

    layout: UpdateLayout
    upload: Upload
    key: tuple[object, ...]

    @property
    def addresses(self) -> Tensor:
        """The addresses, int64 `(T * 8,)`."""
        return self.upload.memory


_Kind = tuple[torch.device, torch.dtype, int]
_tables: dict[_Kind, tuple[UpdateTable, ...]] = {}
_layouts: dict[_Kind, tuple[UpdateLayout, ...]] = {}
_lock = threading.Lock()


def update_table_of(arrays: Arrays, n_programs: int) -> UpdateTable:
    """Returns the table of an update, from the cache if no address has changed, without a sync.

    Args:
        arrays: The tensors.
        n_programs: Number of programs that share the chunks.
    """
    first = arrays.weights[0]
    kind = (first.device, first.dtype, n_programs)
    lists = [*arrays.columns(), (STEP_ADDRESS.value, arrays.steps)]
    pointers = [(column, list(map(Tensor.data_ptr, tensors))) for column, tensors in lists]
    known = (
        list(map(Tensor.numel, arrays.weights)),
        list(arrays.segment_ids),  # copies, since a caller may change its lists
        list(arrays.group_ids),
        list(arrays.counters),
        arrays.vector,
        list(arrays.rows),
        list(arrays.long_rows),
    )
    key = (pointers, known)
    table = next((one for one in _tables.get(kind, ()) if one.key == key), None)
    if table is None:
        table = _built(arrays, kind, key)
        if table.upload.is_lasting and table.layout.upload.is_lasting:
            _keep(_tables, kind, table)
    table.layout.upload.await_on_stream()
    table.upload.await_on_stream()
    return table


def _built(arrays: Arrays, kind: _Kind, key: tuple[Any, ...]) -> UpdateTable:
    pointers, known = key
    addresses = np.zeros((len(arrays.weights), ADDRESS_COLUMNS.value), dtype=np.int64)
    for column, numbers in pointers:
        if numbers:
            addresses[:, column] = numbers
    aligned = np.ones(len(addresses), dtype=bool)
    for column, tensors in arrays.columns():
        aligned &= addresses[:, column] % (arrays.vector * tensors[0].dtype.itemsize) == 0
    layout_key = (known, aligned.tobytes())
    layout = next((one for one in _layouts.get(kind, ()) if one.key == layout_key), None)
    if layout is None:
        layout = _new_layout(kind, known, aligned, layout_key)
    return UpdateTable(layout, upload(addresses.ravel(), kind[0]), key)


def _new_layout(
    kind: _Kind, known: tuple[Any, ...], aligned: np.ndarray, key: tuple[object, ...]
) -> UpdateLayout:
    device, _, n_programs = kind
    sizes, segments, rows, long_rows = (
        np.array(known[i] or [0] * len(aligned), dtype=np.int64) for i in (0, 1, 5, 6)
    )
    vector = known[4]
    aligned = aligned & (rows % vector == 0) & (long_rows % vector == 0)
    chunks = cut(sizes, aligned, segments, rows, long_rows, n_programs)
    tensors = np.zeros((len(aligned), TENSOR_COLUMNS.value), dtype=np.int64)
    columns = (GROUP_COLUMN.value, COUNTER_COLUMN.value)
    for column, numbers in zip(columns, known[2:4], strict=True):
        if numbers:
            tensors[:, column] = numbers
    tensors[:, SIZE_COLUMN.value] = known[0]
    ids = np.arange(len(tensors))
    owners = chunks[:, UPDATE_TENSOR.value]
    first, end = np.searchsorted(owners, ids, "left"), np.searchsorted(owners, ids, "right")
    tensors[:, FIRST_CHUNK_COLUMN.value], tensors[:, CHUNKS_COLUMN.value] = first, end - first
    uploaded = upload(np.concatenate([chunks.ravel(), tensors.ravel()]), device)
    memory = uploaded.memory
    layout = UpdateLayout(uploaded, memory[: chunks.size], memory[chunks.size :], len(chunks), key)
    if uploaded.is_lasting:
        _keep(_layouts, kind, layout)
    return layout


def _keep(cache: dict, kind: _Kind, one: UpdateTable | UpdateLayout) -> None:
    with _lock:  # tuples are replaced, never changed, since other threads may be reading them
        cache[kind] = (one, *cache.get(kind, ())[: TABLES - 1])


def cut(
    sizes: np.ndarray,
    aligned: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    long_rows: np.ndarray,
    n_programs: int,
) -> np.ndarray:
    """Cuts T tensors into chunks: whole units of `rows`, parts of one unit of `long_rows`.

    Args:
        sizes: Elements of each tensor.
        aligned: Whether each tensor, and each of its units, is aligned.
        segments, rows, long_rows: As in `Arrays`.
        n_programs: Number of programs that share the chunks.

    Returns:
        int64 `(C, 6)`, see `columns`.
    """
    if not sizes.sum():
        return np.zeros((0, UPDATE_COLUMNS.value), dtype=np.int64)
    size = chunk_size(int(sizes.sum()), n_programs)
    # each long unit is cut separately
    parts = np.where(long_rows > 0, sizes // np.maximum(long_rows, 1), 1)
    owner = np.repeat(np.arange(len(sizes)), parts)
    part = np.arange(len(owner)) - (np.cumsum(parts) - parts)[owner]
    length = (sizes // np.maximum(parts, 1))[owner]
    row = rows[owner]
    each = np.where(row > 0, np.maximum(size // np.maximum(row, 1), 1) * row, size)
    count = -(-length // each)
    stretch = np.repeat(np.arange(len(owner)), count)
    first = (np.arange(len(stretch)) - (np.cumsum(count) - count)[stretch]) * each[stretch]
    elements = np.minimum(each[stretch], length[stretch] - first)
    tensor, part = owner[stretch], part[stretch]
    columns = [
        tensor,
        part * length[stretch] + first,
        elements,
        aligned[tensor],
        segments[tensor] + part,
        rows[tensor],
    ]
    return np.stack(columns, axis=1).astype(np.int64)
