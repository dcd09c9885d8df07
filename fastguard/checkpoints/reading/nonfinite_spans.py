"""Finds NaN and Inf in the tensors of a file while the file is read in pieces.

Only a piece whose sum is not finite (because of NaN, Inf, or an overflow of large values) is passed
to the measuring stage, which counts NaN, +Inf and -Inf per tensor.

A tensor with gaps between its elements, such as a column of a matrix, needs more: if there is a
non-finite value between its first and last element, that range is read once more, in blocks, to
decide whether the value belongs to the tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.spans import Span
from fastguard.gradients.buckets import FLOATING, bucketize
from fastguard.stages.measure import measure

BLOCK = 64 * 2**20  # bytes read at once from a tensor with gaps
WORK, LEAST_WORK, SMALLEST_WORK, SMALLEST_COUNT = 64, 2 << 30, 20_000, 100_000
"""The bytes that may be examined again to separate views are limited to 64 times the size of the
file, plus 2 GB. A tensor counts as at least 20 kB, or 100 kB if its elements are counted.
"""
_MAX_COUNT = 2**63 - 1  # largest count
CARRY = 16  # bytes of the previous piece: the widest element (complex128) may straddle two pieces


@dataclass(slots=True)
class _Region:
    """A gapless range of bytes from which tensors of one dtype take their elements.

    Views may overlap: a thousand views of the same bytes are summed once, and are examined
    separately only where the sum is not finite.
    """

    dtype: torch.dtype
    start: int
    end: int
    spans: list[Span]  # by first byte
    n_passed: int = 0  # spans at the start of the list that lie before the current piece

    def in_piece(self, start: int, end: int) -> Iterator[Span]:
        """Yields the spans that may have elements in bytes `[start, end)` of the file."""
        while self.n_passed < len(self.spans) and self.spans[self.n_passed].end <= start:
            self.n_passed += 1
        for i in range(self.n_passed, len(self.spans)):
            if self.spans[i].start >= end:
                return
            yield self.spans[i]


def _regions(spans: Sequence[Span]) -> list[_Region]:
    """Returns the regions of some tensors, in file order."""
    regions: list[_Region] = []
    last: dict[tuple[torch.dtype, int], _Region] = {}
    for span in spans:
        if not can_be_nonfinite(span.dtype):
            continue
        key = span.dtype, span.start % span.dtype.itemsize
        region = last.get(key)
        if region is not None and span.start <= region.end:
            region.end = max(region.end, span.end)
            region.spans.append(span)
        else:
            last[key] = _Region(span.dtype, span.start, span.end, [span])
            regions.append(last[key])
    return regions


class SpanSearch:
    """Finds non-finite elements in the spans within each piece."""

    def __init__(self, spans: Sequence[Span], file: BinaryIO, counts: dict[str, list[int]]) -> None:
        self._coming = _regions(spans)[::-1]
        self._open: list[_Region] = []
        self._file = file
        self._counts = counts
        self._budget = WORK * os.fstat(file.fileno()).st_size + LEAST_WORK

    def check_piece(self, buffer: Tensor, start: int, end: int) -> None:
        """Checks the elements that end in bytes `[start, end)` of the file."""
        while self._coming and self._coming[-1].start < end:
            self._open.append(self._coming.pop())
        suspects: list[tuple[Span, Tensor]] = []
        for region in self._open:
            values = _part(region, buffer, start, end)
            if values is None or sum_is_finite(values):
                continue
            if len(region.spans) == 1:
                suspects.append((region.spans[0], values))
                continue
            for span in region.in_piece(start, end):
                values = _part(span, buffer, start, end)
                self._charge(span.name, 0 if values is None else values.nbytes)
                if values is not None and not sum_is_finite(values):
                    suspects.append((span, values))
        count_nonfinite([(s.name, values) for s, values in suspects if s.dense], self._counts)
        for span, _ in suspects:
            if not span.dense and span.name not in self._counts:
                self._counts[span.name] = [0, 0, 0]
                self._count_strided(span)
        self._open = [region for region in self._open if region.end > end]

    def _charge(self, name: str, n_bytes: int) -> None:
        """Limits the work by the file size, since views may repeat the same bytes many times."""
        self._budget -= max(n_bytes, SMALLEST_WORK)
        if self._budget < 0:
            raise DamagedFile(
                "the tensors are views that repeat the same bytes too many times; the check "
                f"stopped at {name:.200}"
            )

    def _count_strided(self, span: Span) -> None:
        """Counts in a tensor with gaps or repetitions, one block of the file at a time."""
        # A dimension of stride 0 repeats elements, which are counted once and then multiplied.
        times = math.prod(s for s, d in zip(span.size, span.stride, strict=True) if d == 0)
        dims = sorted(
            ((d, s) for s, d in zip(span.size, span.stride, strict=True) if d and s > 1),
            reverse=True,
        )
        found: dict[str, list[int]] = {}
        self._count_blocks(span, span.start, dims, found)
        for name, counts in found.items():
            self._counts[name] = [min(n * times, _MAX_COUNT) for n in counts]

    def _count_blocks(
        self, span: Span, start: int, dims: Sequence[tuple[int, int]], found: dict[str, list[int]]
    ) -> None:
        """Counts elements at `start` along `dims`: `(stride, size)` pairs, widest first."""
        itemsize = span.dtype.itemsize
        inner = 1 + sum(d * (s - 1) for d, s in dims[1:])
        step, length = dims[0] if dims else (1, 1)
        rows = min(length, max(1, (BLOCK // itemsize - inner) // step + 1))
        for row in range(0, length, rows):
            n = min(rows, length - row)
            at = start + row * step * itemsize
            if inner * itemsize > BLOCK and len(dims) > 1:
                self._charge(span.name, 0)
                self._count_blocks(span, at, dims[1:], found)
                continue
            n_elements = (n - 1) * step + inner
            size, stride = [n, *(s for _, s in dims[1:])], [step, *(d for d, _ in dims[1:])]
            n_bytes = max(n_elements, math.prod(size)) * itemsize
            self._charge(span.name, max(n_bytes, SMALLEST_COUNT))
            raw = torch.empty(n_elements * itemsize, dtype=torch.uint8, device="cpu")
            self._read(raw, at, span.name)
            count_nonfinite([(span.name, raw.view(span.dtype).as_strided(size, stride))], found)

    def _read(self, raw: Tensor, start: int, name: str) -> None:
        view = memory_of(raw)
        done = 0
        while done < len(view):
            n = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if n == 0:
                raise DamagedFile(f"{name:.200} extends past the end of the file")
            done += n


def memory_of(raw: Tensor) -> memoryview:
    """Returns the memory of a uint8 CPU tensor."""
    return memoryview(raw.numpy())  # type: ignore[arg-type]  (numpy arrays are buffers)


def _part(part: Span | _Region, buffer: Tensor, start: int, end: int) -> Tensor | None:
    """Returns the elements of a span or region that end in bytes `[start, end)`, or None."""
    itemsize = part.dtype.itemsize
    first = max(0, (start - part.start) // itemsize)
    stop = min((part.end - part.start) // itemsize, (end - part.start) // itemsize)
    if first >= stop:
        return None
    low = part.start + first * itemsize - (start - CARRY)  # the buffer begins before the piece
    return _typed(buffer[low : low + (stop - first) * itemsize], part.dtype)


def can_be_nonfinite(dtype: torch.dtype) -> bool:
    """Whether a dtype can represent NaN or Inf."""
    is_float = dtype.is_floating_point or dtype.is_complex
    return is_float and dtype is not torch.float4_e2m1fn_x2


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # safetensors does not guarantee alignment
    return raw.view(dtype)


def sum_is_finite(values: Tensor) -> bool:
    """Whether the sum of the values is finite."""
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype not in FLOATING:  # fp8 has no sum
        values = values.float()
    if math.isfinite(values.sum().item()):
        return True
    # An fp16 sum may exceed 65504; summing in float32 straight away costs six times as much.
    return values.dtype is torch.float16 and math.isfinite(values.sum(dtype=torch.float32).item())


def count_nonfinite(named: Sequence[tuple[str, Tensor]], counts: dict[str, list[int]]) -> None:
    """Adds the numbers of NaN, +Inf and -Inf in each tensor to its counts."""
    real = []
    for name, tensor in named:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if not tensor.is_floating_point():
            continue
        real.append((name, tensor if tensor.dtype in FLOATING else tensor.float()))  # fp8
    stats = measure(bucketize([t for _, t in real], names=[name for name, _ in real]))
    for name, *found in stats.culprits():
        counts[name] = [a + b for a, b in zip(counts.get(name, [0, 0, 0]), found, strict=True)]
