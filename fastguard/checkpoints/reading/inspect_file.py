"""One read of a checkpoint file: which tensors hold NaN or Inf, and its checksums.

The file goes by in pieces of 4 MB, in file order. While one thread hashes a piece, the other sums
it: as everywhere in fastguard, **the sum is the finiteness flag**. Only a piece whose sum is not
finite (NaN, Inf, or large values that overflow) is looked at again by the measuring stage, which
counts NaN, +Inf and -Inf per tensor. So the memory is that of two pieces, whatever the file.

The one exception is a tensor that does not hold all the elements between its first and its last (a
column of a matrix, say): when something non-finite lies there, the whole stretch is read once, in
blocks, to see whether it belongs to the tensor.

Tried and dropped: the measuring stage on every piece (bf16 at a sixth of the speed of the sum),
`mmap` (resident memory grows with the file), hashing and summing in one thread (1.4x).
"""

from __future__ import annotations

import codecs
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.contents import contents_of
from fastguard.checkpoints.reading.inert_values import LongBytes
from fastguard.checkpoints.reading.meant_infinite import meant_infinite
from fastguard.checkpoints.reading.spans import Contents, Record, Span
from fastguard.errors import Culprit
from fastguard.gradients.buckets import FLOATING, bucketize
from fastguard.records.regular_files import open_regular
from fastguard.stages.measure import measure

PIECE = 4 * 2**20
BLOCK = 16 * PIECE  # what is read at once of a tensor with gaps
WORK, LEAST_WORK, SMALLEST_WORK, SMALLEST_COUNT = 64, 2 << 30, 20_000, 100_000
"""Bytes looked at a second time to tell views apart: at most 64 times the file and 2 GB, the
smallest tensor taken for 20 kB, and for 100 kB where its elements are counted one by one."""
_MOST = 2**63 - 1  # of what is counted
CARRY = 16  # bytes of the piece before: the widest element (complex128) may straddle two pieces


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one read of a file says.

    Attributes:
        size: Bytes.
        sha256: Of the whole file, hexadecimal; None if not asked for.
        contents: What the file holds.
        bad: `(name, nan, posinf, neginf)` of each tensor with non-finite elements, in file order,
            unless they are meant to be infinite.
        damaged: Names of the records that do not have the checksum that the file states.
        meant: The tensors that are infinite by design, as in `bad`, and what each is.
    """

    size: int
    sha256: str | None
    contents: Contents
    bad: tuple[Culprit, ...]
    damaged: tuple[str, ...]
    meant: tuple[tuple[Culprit, str], ...] = ()


def inspect(
    path: str | os.PathLike[str],
    *,
    sha256: bool = False,
    crc32: bool = True,
    follow_links: bool = True,
) -> Inspection:
    """Reads a `.pt`, `.pth` or `.safetensors` file once and executes nothing of it.

    Args:
        path: The file.
        sha256: Whether to hash it.
        crc32: Whether to compare its records with the checksums that torch wrote beside them.
        follow_links: As in `open_regular`.

    Raises:
        DamagedFile, UnsafeFile, OSError: As `read_contents`.
    """
    with open_regular(path, follow_links=follow_links) as file:
        contents = contents_of(file, path)
        try:
            return read_through(file, contents, sha256=sha256, crc32=crc32)
        except CheckpointError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None
        except OSError:
            raise
        except Exception as error:  # what no tensor of torch or array of numpy can be
            raise DamagedFile(f"{os.fspath(path)}: damaged ({error!r:.200})") from None


def read_through(file: BinaryIO, contents: Contents, *, sha256: bool, crc32: bool) -> Inspection:
    """`inspect`, of an open file whose contents are known."""
    digests = _Digests(sha256, contents.records if crc32 else ())
    counts: dict[str, list[int]] = {}
    with torch.inference_mode():
        look = _Look(contents.spans, file, counts)
        file.seek(0)
        for buffer, start, end in _pieces(file, digests):
            look.at(buffer, start, end)
        size = os.fstat(file.fileno()).st_size
        for name, array in contents.arrays:
            for tensor in array.pieces(_left_in(file)):
                if _can_be_nonfinite(tensor.dtype) and not _sum_is_finite(tensor):
                    _count([(name, tensor)], counts)
    names = [span.name for span in contents.spans] + [name for name, _ in contents.arrays]
    found = {name: counts[name] for name in names if any(counts.get(name, ()))}
    why = meant_infinite(file, contents, found)
    culprits: list[Culprit] = [(name, *map(int, n)) for name, n in found.items()]  # type: ignore[misc]
    return Inspection(
        size,
        digests.sha256(),
        contents,
        tuple(culprit for culprit in culprits if culprit[0] not in why),
        digests.damaged(),
        tuple((culprit, why[culprit[0]]) for culprit in culprits if culprit[0] in why),
    )


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open_regular(path) as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    """`sha256_of`, of a file that is open; left at its start."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


class _Digests:
    """Checksums of a stream of pieces, computed on a thread of their own."""

    def __init__(self, sha256: bool, records: Sequence[Record]) -> None:
        self._sha256 = hashlib.sha256() if sha256 else None
        self._records = records
        self._crcs = [0] * len(records)
        self._next = 0

    @property
    def wanted(self) -> bool:
        return self._sha256 is not None or bool(self._records)

    def update(self, piece: memoryview, start: int) -> None:
        if self._sha256 is not None:
            self._sha256.update(piece)
        end = start + len(piece)
        while self._next < len(self._records):
            record = self._records[self._next]
            if record.start >= end:
                return
            low, high = max(record.start - start, 0), min(record.end - start, len(piece))
            self._crcs[self._next] = zlib.crc32(piece[low:high], self._crcs[self._next])
            if record.end > end:
                return
            self._next += 1

    def sha256(self) -> str | None:
        return None if self._sha256 is None else self._sha256.hexdigest()

    def damaged(self) -> tuple[str, ...]:
        """Records with another checksum than stated.

        If no record has the stated one, torch was told not to compute them: then nothing is known.
        """
        wrong = [r.name for r, crc in zip(self._records, self._crcs, strict=True) if crc != r.crc32]
        return () if len(wrong) == len(self._records) else tuple(wrong)


def _pieces(file: BinaryIO, digests: _Digests) -> Iterator[tuple[Tensor, int, int]]:
    """Reads the file front to back, and gives each piece to `digests` meanwhile.

    Yields:
        A uint8 buffer that begins with the last `CARRY` bytes of the piece before, and the first
        byte and the end of the piece in the file. The buffer is used again two pieces later.
    """
    buffers = [torch.empty(CARRY + PIECE, dtype=torch.uint8) for _ in range(2)]
    hashed: list[Future | None] = [None, None]
    start, last = 0, None
    with ThreadPoolExecutor(1) as pool:
        for turn in _forever():
            buffer, busy = buffers[turn], hashed[turn]
            if busy is not None:
                busy.result()
            if last is not None:
                buffer[:CARRY] = last
            view = _memory(buffer)[CARRY:]
            n = _read_into(file, view)
            if n == 0:
                return
            if digests.wanted:
                hashed[turn] = pool.submit(digests.update, view[:n], start)
            yield buffer, start, start + n
            last = buffer[n : n + CARRY]
            start += n


def _memory(raw: Tensor) -> memoryview:
    return memoryview(raw.numpy())  # type: ignore[arg-type]  (numpy arrays are buffers)


def _forever() -> Iterator[int]:
    while True:
        yield 0
        yield 1


def _read_into(file: BinaryIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        n = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not n:
            break
        filled += n
    return filled


@dataclass(slots=True)
class _Region:
    """Bytes that tensors of a dtype take their elements from, without a gap between them.

    Views overlap: a thousand of them over the same bytes are summed once, and told apart only where
    something non-finite lies.
    """

    dtype: torch.dtype
    start: int
    end: int
    spans: list[Span]  # by first byte
    n_passed: int = 0  # spans at the beginning of the list that lie before the current piece

    def in_piece(self, start: int, end: int) -> Iterator[Span]:
        """The spans that may have elements in the file's bytes `[start, end)`."""
        while self.n_passed < len(self.spans) and self.spans[self.n_passed].end <= start:
            self.n_passed += 1
        for i in range(self.n_passed, len(self.spans)):
            if self.spans[i].start >= end:
                return
            yield self.spans[i]


def _regions(spans: Sequence[Span]) -> list[_Region]:
    """The regions of some tensors, in file order."""
    regions: list[_Region] = []
    last: dict[tuple[torch.dtype, int], _Region] = {}
    for span in spans:
        if not _can_be_nonfinite(span.dtype):
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


class _Look:
    """Finds what is non-finite in the spans that lie in each piece."""

    def __init__(self, spans: Sequence[Span], file: BinaryIO, counts: dict[str, list[int]]) -> None:
        self._coming = _regions(spans)[::-1]
        self._open: list[_Region] = []
        self._file = file
        self._counts = counts
        self._budget = WORK * os.fstat(file.fileno()).st_size + LEAST_WORK

    def at(self, buffer: Tensor, start: int, end: int) -> None:
        """Looks at the elements that end in the file's bytes `[start, end)`."""
        while self._coming and self._coming[-1].start < end:
            self._open.append(self._coming.pop())
        suspects: list[tuple[Span, Tensor]] = []
        for region in self._open:
            values = _part(region, buffer, start, end)
            if values is None or _sum_is_finite(values):
                continue
            if len(region.spans) == 1:
                suspects.append((region.spans[0], values))
                continue
            for span in region.in_piece(start, end):
                values = _part(span, buffer, start, end)
                self._charge(span.name, 0 if values is None else values.nbytes)
                if values is not None and not _sum_is_finite(values):
                    suspects.append((span, values))
        _count([(s.name, values) for s, values in suspects if s.dense], self._counts)
        for span, _ in suspects:
            if not span.dense and span.name not in self._counts:
                self._counts[span.name] = [0, 0, 0]
                self._count_strided(span)
        self._open = [region for region in self._open if region.end > end]

    def _charge(self, name: str, n_bytes: int) -> None:
        """Bounds the work by the size of the file: views may name the same bytes many times."""
        self._budget -= max(n_bytes, SMALLEST_WORK)
        if self._budget < 0:
            raise DamagedFile(
                f"its tensors are views of the same bytes many times over, which is odd; given up "
                f"at {name:.200}"
            )

    def _count_strided(self, span: Span) -> None:
        """Counts in a tensor with gaps or repetitions, a block of the file at a time."""
        # A dimension of stride 0 repeats what is there: counted once, and multiplied.
        times = math.prod(s for s, d in zip(span.size, span.stride, strict=True) if d == 0)
        dims = sorted(
            ((d, s) for s, d in zip(span.size, span.stride, strict=True) if d and s > 1),
            reverse=True,
        )
        found: dict[str, list[int]] = {}
        self._count_blocks(span, span.start, dims, found)
        for name, counts in found.items():
            self._counts[name] = [min(n * times, _MOST) for n in counts]

    def _count_blocks(
        self, span: Span, start: int, dims: Sequence[tuple[int, int]], found: dict[str, list[int]]
    ) -> None:
        """Of the elements at `start` and along `dims`, `(stride, size)` with the widest first."""
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
            raw = torch.empty(n_elements * itemsize, dtype=torch.uint8)
            self._read(raw, at, span.name)
            _count([(span.name, raw.view(span.dtype).as_strided(size, stride))], found)

    def _read(self, raw: Tensor, start: int, name: str) -> None:
        view = _memory(raw)
        done = 0
        while done < len(view):
            n = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if n == 0:
                raise DamagedFile(f"{name:.200} ends behind the end of the file")
            done += n


def _part(part: Span | _Region, buffer: Tensor, start: int, end: int) -> Tensor | None:
    """The elements of a span or region that end in the file's bytes `[start, end)`, if any."""
    itemsize = part.dtype.itemsize
    first = max(0, (start - part.start) // itemsize)
    stop = min((part.end - part.start) // itemsize, (end - part.start) // itemsize)
    if first >= stop:
        return None
    low = part.start + first * itemsize - (start - CARRY)  # the buffer begins before the piece
    return _typed(buffer[low : low + (stop - first) * itemsize], part.dtype)


def _left_in(file: BinaryIO) -> Callable[[LongBytes], Iterator[bytes]]:
    """Reads the numbers of a numpy array that the pickle holds, a piece at a time."""

    def read(left: LongBytes) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        for start in range(0, left.n_stored, PIECE):
            n = min(PIECE, left.n_stored - start)
            piece = os.pread(file.fileno(), n, left.start + start)
            yield decoder.decode(piece).encode("latin1") if left.is_text else piece

    return read


def _can_be_nonfinite(dtype: torch.dtype) -> bool:
    is_float = dtype.is_floating_point or dtype.is_complex
    return is_float and dtype is not torch.float4_e2m1fn_x2


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # safetensors does not promise alignment
    return raw.view(dtype)


def _sum_is_finite(values: Tensor) -> bool:
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype not in FLOATING:  # fp8 has no sum
        values = values.float()
    if math.isfinite(values.sum().item()):
        return True
    # In fp16 a sum may exceed 65504; asking for a float32 sum at once costs six times as much.
    return values.dtype is torch.float16 and math.isfinite(values.sum(dtype=torch.float32).item())


def _count(named: Sequence[tuple[str, Tensor]], counts: dict[str, list[int]]) -> None:
    """Adds how many NaN, +Inf and -Inf each tensor holds to its counts."""
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
