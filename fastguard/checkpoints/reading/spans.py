"""Where tensors lie in a file: nothing but byte positions, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastguard.checkpoints.reading.pickled_arrays import NumpyArray


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor in a file.

    Attributes:
        name: Its path in the tree, `"ema.0.weight"`.
        dtype: Of its elements.
        start: First byte, from the beginning of the file.
        n: Elements from its first to its last one, gaps included.
        size, stride: As in torch, in elements.
        dense: Whether the tensor holds each of these elements exactly once.
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


@dataclass(frozen=True, slots=True)
class Record:
    """A stretch of bytes whose CRC-32 the file itself states."""

    name: str
    start: int
    end: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds.

    Attributes:
        format: `"torch"`, `"torch (legacy)"`, `"torch (shards)"` or `"safetensors"`.
        tree: The nested containers, with `TensorRef`s for tensors; of safetensors the spans by
            name, those of no elements too; None for shards.
        spans: The tensors, each view of the data once, in file order.
        records: Checksums that the file carries, in file order.
        arrays: Arrays of numpy that stand in the pickle itself, of numbers that can be looked at.
        unread: Name of each thing whose numbers cannot be looked at, and what it is.
        metadata: Strings that a safetensors file carries.
        names: Classes and functions that the pickle names, in the order of appearance.
    """

    format: str
    tree: Any
    spans: tuple[Span, ...]
    records: tuple[Record, ...] = ()
    arrays: tuple[tuple[str, NumpyArray], ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def n_tensors(self) -> int:
        return len(self.spans) + len(self.arrays)
