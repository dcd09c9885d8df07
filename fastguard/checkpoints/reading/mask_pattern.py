"""Detects whether non-finite elements form a mask or are masked out; reads tensors in blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

import torch
from torch import Tensor

from fastguard.checkpoints.reading.spans import Span, is_dense

_BLOCK = 4 * 2**20  # bytes
_LEAST = 3
"""Minimum number of -Inf in a mask; with fewer, no pattern can be recognized."""
_SHARE = 8
"""Minimum density: at least one in eight elements of a mask is -Inf."""


def is_banded(file: BinaryIO, span: Span) -> bool:
    """Whether the tensor is a causal mask, a sliding-window mask, or a batch of them.

    In such a mask, whether an element is -Inf depends only on its distance to the diagonal: each
    row is the previous row shifted by one. Weights do not have this pattern. Finite values are
    ignored, since ALiBi adds slopes to masks.
    """
    span = _without_repetitions(span)
    n_dimensions = len(span.size)
    inner = _as_it_lies(span)[-2:]  # a transposed mask is accepted too
    if set(inner) != {n_dimensions - 2, n_dimensions - 1}:
        return False
    n_rows, n_infinite, before = span.size[inner[0]], 0, None
    for first, rows in _rows(file, span):
        infinite = rows.isneginf()
        if before is not None:
            infinite = torch.cat([before, infinite])
            first -= 1
        moved = infinite[1:, 1:] == infinite[:-1, :-1]
        # the first row of the next matrix in a batch
        begins = torch.arange(first + 1, first + len(infinite), device="cpu") % n_rows == 0
        if not (moved.all(dim=1) | begins).all():
            return False
        n_infinite += int(infinite.sum()) - (0 if before is None else int(before.sum()))
        before = infinite[-1:]
    n = math.prod(span.size)
    return n_infinite >= max(_LEAST, n / _SHARE) and n_infinite < n


def is_two_valued(file: BinaryIO, span: Span) -> bool:
    """Whether the tensor contains only -Inf and 0."""
    span = _without_repetitions(span)
    return all(bool((rows.isneginf() | (rows == 0)).all()) for _, rows in _rows(file, span))


def is_finite_under(file: BinaryIO, span: Span, mask: Span) -> bool:
    """Whether the elements of a tensor that a boolean mask selects are finite."""
    if span.size != mask.size or mask.dtype is not torch.bool or span.stride != mask.stride:
        return False
    return span.dense and all(
        bool((rows.isfinite() | ~selected).all())
        for rows, selected in zip(
            _blocks(file, span, torch.float64), _blocks(file, mask, torch.bool), strict=True
        )
    )


def _blocks(file: BinaryIO, span: Span, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the elements of a gapless tensor in blocks."""
    for first in range(0, span.n, _BLOCK):
        n_bytes = min(_BLOCK, span.n - first) * span.dtype.itemsize
        raw = bytearray(os.pread(file.fileno(), n_bytes, span.start + first * span.dtype.itemsize))
        found = torch.frombuffer(raw, dtype=span.dtype)
        yield found.abs().to(dtype) if found.is_complex() else found.to(dtype)


def _without_repetitions(span: Span) -> Span:
    """Shrinks expanded dimensions (stride 0), as in a mask repeated for a batch, to size 1."""
    size = tuple(1 if d == 0 else n for n, d in zip(span.size, span.stride, strict=True))
    return replace(span, size=size, dense=is_dense(size, span.stride))


def _as_it_lies(span: Span) -> list[int]:
    """Returns the dimensions with size > 1, ordered by stride; the contiguous one is last."""
    long = [d for d, size in enumerate(span.size) if size != 1]
    return sorted(long, key=lambda d: -span.stride[d])


def _rows(file: BinaryIO, span: Span) -> Iterator[tuple[int, Tensor]]:
    """Yields blocks of rows in memory order, each with the index of its first row.

    For complex tensors, and tensors with gaps or with rows too long to read, yields a single NaN,
    which no mask contains.
    """
    dimensions = _as_it_lies(span)
    n_columns = span.size[dimensions[-1]] if dimensions else 1
    width = n_columns * span.dtype.itemsize
    if not span.dense or span.dtype.is_complex or width > 16 * _BLOCK:
        yield 0, torch.tensor([[math.nan]], device="cpu")
        return
    at_once = max(_BLOCK // width, 1)
    n_rows = span.n // n_columns
    for first in range(0, n_rows, at_once):
        n_bytes = min(at_once, n_rows - first) * width
        raw = bytearray(os.pread(file.fileno(), n_bytes, span.start + first * width))
        rows = torch.frombuffer(raw, dtype=span.dtype).view(-1, n_columns)
        yield first, rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
