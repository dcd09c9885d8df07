"""The table of units for adaptive gradient clipping: where the rows of each tensor are.

    tensors  int64 (T + 1, 5): gradient, weight, elements per row, first unit, aligned
    limits   float64 (2,): clip_factor and eps

A unit is a row of one tensor; see `units`. The table has one row per tensor, not per unit, since a
model with 8 billion parameters has 1.5 million units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.chunk_layout import ALIGNMENT
from fastguard.kernels.chunks import TABLES, Bucket, is_dense
from fastguard.kernels.upload import Upload, upload

KEY = -1  # key in a bucket's memo; the keys of chunk tables are numbers of segments


class Units(Protocol):
    """The input of a table; see `fastguard.gradients.unit_buckets.UnitBucket`."""

    @property
    def bucket(self) -> Bucket: ...
    @property
    def weights(self) -> list[Tensor]: ...
    @property
    def counts(self) -> list[int]: ...


@dataclass(slots=True, eq=False)
class UnitTable:
    """The units of one bucket, on the device of the gradients.

    Attributes:
        upload: The memory of the table.
        tensors: int64 `((T + 1) * 5,)`: one row per tensor with elements; see `columns`. The last
            row contains only the total number of units, as `FIRST_UNIT`.
        limits: float64 `(2,)`: clip_factor and eps.
        n_tensors: T.
        n_units: U.
        grad_copies, weight_copies: `(position, contiguous buffer)` of tensors whose rows are not
            contiguous.
        key: Everything that the table depends on.
    """

    upload: Upload
    tensors: Tensor
    limits: Tensor
    n_tensors: int
    n_units: int
    grad_copies: tuple[tuple[int, Tensor], ...]
    weight_copies: tuple[tuple[int, Tensor], ...]
    key: tuple[object, ...]


_tables: dict[torch.device, tuple[UnitTable, ...]] = {}  # tuples are replaced, never changed


def unit_table(units: Units, limits: tuple[float, ...] | None = None) -> UnitTable:
    """Returns the table of a bucket, from the cache if no address has changed, without a sync.

    Args:
        units: The gradients and weights.
        limits: clip_factor and eps. None: the limits of the last call for this bucket.
    """
    kept = units.bucket.memo.tables.get(KEY)
    if kept is not None and limits is None:
        return kept
    device = units.bucket.device
    key = (limits, units.counts, _places(units.bucket.grads), _places(units.weights))
    table = next((t for t in _tables.get(device, ()) if t.key == key), None)
    if table is None:
        table = _built(units, limits or (1.0, 1.0), key)
        if table.upload.is_lasting:
            _tables[device] = (table, *_tables.get(device, ())[: TABLES - 1])
    units.bucket.memo.tables[KEY] = table
    table.upload.await_on_stream()
    return table


def _places(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return (
        [t.dtype for t in tensors[:1]],
        list(map(Tensor.data_ptr, tensors)),
        [tuple(t.shape) for t in tensors],
        [t.stride() for t in tensors],
    )


def _built(units: Units, limits: tuple[float, ...], key: tuple[object, ...]) -> UnitTable:
    grads, grad_copies = _in_rows(units.bucket.grads, units.counts)
    weights, weight_copies = _in_rows(units.weights, units.counts)
    rows = []
    first = 0
    for grad, weight, n in zip(grads, weights, units.counts, strict=True):
        if n:
            row = grad.numel() // n
            aligned = _aligned(grad, row) + 2 * _aligned(weight, row)
            rows.append([grad.data_ptr(), weight.data_ptr(), row, first, aligned])
            first += n
    rows.append([0, 0, 0, first, 0])
    table = np.array(rows, dtype=np.int64).ravel()
    numbers = np.concatenate([table, np.array(limits, dtype=np.float64).view(np.int64)])
    buffers = tuple(buffer for _, buffer in (*grad_copies, *weight_copies))
    uploaded = upload(numbers, units.bucket.device, buffers)
    return UnitTable(
        upload=uploaded,
        tensors=uploaded.memory[: table.size],
        limits=uploaded.memory[table.size :].view(torch.float64),
        n_tensors=len(rows) - 1,
        n_units=first,
        grad_copies=grad_copies,
        weight_copies=weight_copies,
        key=key,
    )


def _aligned(t: Tensor, row: int) -> bool:
    """Returns whether every row begins and ends at a multiple of 16 bytes."""
    return (t.data_ptr() | row * t.element_size()) % ALIGNMENT == 0


def _in_rows(
    tensors: Sequence[Tensor], counts: Sequence[int]
) -> tuple[list[Tensor], tuple[tuple[int, Tensor], ...]]:
    """Replaces tensors whose rows are not contiguous with buffers; also returns the buffers."""
    copies = {
        i: torch.empty_like(t, memory_format=torch.contiguous_format)
        for i, (t, n) in enumerate(zip(tensors, counts, strict=True))
        if n and not _has_rows(t, n)
    }
    return [copies.get(i, t) for i, t in enumerate(tensors)], tuple(copies.items())


def _has_rows(t: Tensor, n: int) -> bool:
    """Returns whether the n rows are contiguous and consecutive in memory."""
    if t.is_contiguous():
        return True
    return is_dense(t) and (n == 1 or t.stride(0) == t.numel() // n)
