"""Checks a checkpoint file in one pass: finds tensors with NaN or Inf, and verifies checksums.

The file is read in pieces of 4 MB, in file order. One thread hashes a piece while another sums it:
**if the sum is finite, so are all elements**. Only a piece with a non-finite sum is examined again
(`nonfinite_spans`). The memory for two pieces is enough for any file size.

Rejected alternatives: measuring every piece (for bf16, a sixth of the speed of the sum), `mmap`
(resident memory grows with the file), and hashing and summing on one thread (1.4 times the time).
"""

from __future__ import annotations

import codecs
import hashlib
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
from fastguard.checkpoints.reading.nonfinite_spans import (
    CARRY,
    SpanSearch,
    can_be_nonfinite,
    count_nonfinite,
    memory_of,
    sum_is_finite,
)
from fastguard.checkpoints.reading.spans import Contents, Record
from fastguard.errors import Culprit
from fastguard.records.regular_files import open_regular

PIECE = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of one pass over a file.

    Attributes:
        size: File size in bytes.
        sha256: Checksum of the whole file, hexadecimal; None if not requested.
        contents: The contents of the file.
        bad: `(name, nan, posinf, neginf)` for each tensor with non-finite elements, in file order,
            except tensors that are infinite by design.
        damaged: Names of the records whose checksum differs from the stated one.
        meant: The tensors that are infinite by design, in the form of `bad`, each with the reason.
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
    """Reads a `.pt`, `.pth` or `.safetensors` file once and executes nothing in it.

    Args:
        path: The file.
        sha256: Whether to hash the file.
        crc32: Whether to check records against the checksums that torch stored.
        follow_links: See `open_regular`.

    Raises:
        DamagedFile, UnsafeFile, OSError: See `read_contents`.
    """
    with open_regular(path, follow_links=follow_links) as file:
        contents = contents_of(file, path)
        try:
            return read_through(file, contents, sha256=sha256, crc32=crc32)
        except CheckpointError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None
        except OSError:
            raise
        except Exception as error:  # raised by torch or numpy for impossible values
            raise DamagedFile(f"{os.fspath(path)}: damaged ({error!r:.200})") from None


def read_through(file: BinaryIO, contents: Contents, *, sha256: bool, crc32: bool) -> Inspection:
    """Like `inspect`, for an open file whose contents are known."""
    digests = _Digests(sha256, contents.records if crc32 else ())
    counts: dict[str, list[int]] = {}
    with torch.inference_mode():
        search = SpanSearch(contents.spans, file, counts)
        file.seek(0)
        for buffer, start, end in _pieces(file, digests):
            search.check_piece(buffer, start, end)
        size = os.fstat(file.fileno()).st_size
        for name, array in contents.arrays:
            for tensor in array.pieces(_left_in(file)):
                if can_be_nonfinite(tensor.dtype) and not sum_is_finite(tensor):
                    count_nonfinite([(name, tensor)], counts)
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
    """Returns the SHA-256 of a file, hexadecimal."""
    with open_regular(path) as file:
        return sha256_of_open(file)


def sha256_of_open(file: BinaryIO) -> str:
    """Like `sha256_of`, for an open file; leaves it positioned at the start."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


class _Digests:
    """Computes checksums of a stream of pieces on a separate thread."""

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
        """Returns the records whose checksum differs from the stated one.

        If no record matches, torch did not compute checksums; then the list is empty.
        """
        wrong = [r.name for r, crc in zip(self._records, self._crcs, strict=True) if crc != r.crc32]
        return () if len(wrong) == len(self._records) else tuple(wrong)


def _pieces(file: BinaryIO, digests: _Digests) -> Iterator[tuple[Tensor, int, int]]:
    """Reads the file from front to back and passes each piece to `digests`.

    Yields:
        A uint8 buffer that begins with the last `CARRY` bytes of the previous piece, and the
        piece's first byte and end in the file. The buffer is reused two pieces later.
    """
    buffers = [torch.empty(CARRY + PIECE, dtype=torch.uint8, device="cpu") for _ in range(2)]
    hashed: list[Future | None] = [None, None]
    start, last = 0, None
    with ThreadPoolExecutor(1) as pool:
        for turn in _forever():
            buffer, busy = buffers[turn], hashed[turn]
            if busy is not None:
                busy.result()
            if last is not None:
                buffer[:CARRY] = last
            view = memory_of(buffer)[CARRY:]
            n = _read_into(file, view)
            if n == 0:
                return
            if digests.wanted:
                hashed[turn] = pool.submit(digests.update, view[:n], start)
            yield buffer, start, start + n
            last = buffer[n : n + CARRY]
            start += n


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


def _left_in(file: BinaryIO) -> Callable[[LongBytes], Iterator[bytes]]:
    """Returns a reader for the numbers of a numpy array in the pickle, piece by piece."""

    def read(left: LongBytes) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        for start in range(0, left.n_stored, PIECE):
            n = min(PIECE, left.n_stored - start)
            piece = os.pread(file.fileno(), n, left.start + start)
            yield decoder.decode(piece).encode("latin1") if left.is_text else piece

    return read
