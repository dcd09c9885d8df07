"""Positions of tensors in a file: byte offsets, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastguard.checkpoints.reading.pickled_arrays import NumpyArray


@dataclass(frozen=True, slots=True)
class Span:
    """The position of a tensor in a file.

    Attributes:
        name: The path of the tensor in the tree, such as `"ema.0.weight"`.
        dtype: Type of its elements.
        start: First byte, counted from the beginning of the file.
        n: Number of elements from the first to the last, including gaps.
        size, stride: As in torch, in elements.
        dense: Whether the tensor uses each element of this range exactly once.
    """

    name: str
    dtype: torch.dtype
    start: int
    n: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dense: bool

    @property
    def end(self) -> int:
        return self.start + self.n * self.dtype.itemsize


def is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor uses each element from its first to its last exactly once."""
    expected = 1
    for step, length in sorted((d, s) for s, d in zip(size, stride, strict=True) if s != 1):
        if step != expected:
            return False
        expected *= length
    return True


@dataclass(frozen=True, slots=True)
class Record:
    """A range of bytes whose CRC-32 is stored in the file."""

    name: str
    start: int
    end: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a file.

    Attributes:
        format: `"torch"`, `"torch (legacy)"`, `"torch (shards)"` or `"safetensors"`.
        tree: The nested containers, with a `TensorRef` for each tensor. For safetensors, the spans
            by name, including empty ones; None for shards.
        spans: The tensors in file order; identical views of the same data are listed once.
        records: Checksums stored in the file, in file order.
        arrays: Numpy arrays in the pickle itself whose numbers can be checked.
        unread: Name and description of each value whose numbers cannot be checked.
        metadata: Strings stored in a safetensors file.
        names: Classes and functions named in the pickle, in order of appearance.
        refused: Other parts of the pickle that `torch.load(weights_only=True)` refuses.
        nan: Names of the Python floats that are NaN, such as a learning rate or loss scale.
            Infinite floats are not listed, since `ReduceLROnPlateau` starts with one, and
            `max_norm` may be infinite.
        spent: See `BoundedReader`.
    """

    format: str
    tree: Any
    spans: tuple[Span, ...]
    records: tuple[Record, ...] = ()
    arrays: tuple[tuple[str, NumpyArray], ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    nan: tuple[str, ...] = ()
    spent: int = 0

    @property
    def n_tensors(self) -> int:
        return len(self.spans) + len(self.arrays)
