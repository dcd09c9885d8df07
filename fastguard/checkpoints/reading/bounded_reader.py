"""The bytes of a pickle, read within a budget of memory and time.

A length in a pickle is a claim: it is compared with what the file holds before anything is
allocated for it, and what is read is charged to the budget.
"""

from __future__ import annotations

import codecs
import os
from typing import IO

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inert_values import LongBytes, LongText

BUDGET = 1_200_000_000
"""Bytes, roughly, that what one pickle describes may take, the work for it counted as bytes too:
some 12 million opcodes, or 200,000 tensors. One of many bytes has 16 for each of them more, up to
twice as much."""
SHORT, LONG, KEPT = 4096, 16 << 20, 64 << 20
"""Text and bytes are left in the file (arrays of numpy are pickled as such) where one has more than
16 MB, and from 4 kB on when 64 MB of them have been kept."""
_LINE = 1 << 20  # bytes; the longest argument of an opcode of protocol 0
_DIGITS = 5000


class BoundedReader:
    """Reads the arguments of opcodes; see the top of this file.

    Args:
        file: Open for reading, at the start of the pickle.
        origin: The byte of the whole file at which `file` begins, if it is a part of one.
    """

    def __init__(self, file: IO[bytes], origin: int = 0) -> None:
        self._file = file
        self._origin = origin
        at = file.tell()
        n_bytes = file.seek(0, os.SEEK_END) - file.seek(at)
        self._budget = BUDGET + min(16 * n_bytes, BUDGET)
        self._kept = 0

    def charge(self, n_bytes: int) -> None:
        """Takes what some work costs from the budget; the next step finds it used up."""
        self._budget -= n_bytes

    def _bytes(self, n: int) -> bytes:
        if n < 0:
            raise ValueError("negative length")
        self.charge(5 * n)  # of text in four bytes a character, and as it is stored
        if n > SHORT:  # `read` allocates first: is there as much?
            self._check_left(n)
            if self._budget < 0:
                raise DamagedFile(f"its pickle holds a value of {n:,} bytes, which is odd")
        raw = self._file.read(n)
        if len(raw) < n:
            raise DamagedFile("its pickle ends too soon")
        return raw

    def _check_left(self, n: int) -> int:
        """Where the file stands, if there are `n` bytes more."""
        at = self._file.tell()
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(at)
        if n > end - at:
            raise DamagedFile("its pickle ends too soon")
        return at

    def _line(self) -> bytes:
        raw = self._file.readline(_LINE)
        if not raw.endswith(b"\n"):
            raise DamagedFile("its pickle has a line without end")
        self.charge(3 * len(raw))
        return raw[:-1]

    def _digits(self) -> bytes:
        raw = self._line()
        if len(raw) > _DIGITS:
            raise DamagedFile(f"its pickle has a number of {len(raw):,} digits")
        return raw

    def _is_kept(self, n: int) -> bool:
        """Whether text or bytes are read now, or left in the file."""
        if n <= SHORT:
            return True
        if n > LONG or self._kept + n > KEPT:
            return False
        self._kept += n
        return True

    def _text(self, n: int) -> str | LongText:
        if self._is_kept(n):
            return self._bytes(n).decode("utf-8", "surrogatepass")
        at, n_characters = self._check_left(n), 0
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        for start in range(0, n, LONG):
            piece = self._file.read(min(LONG, n - start))
            n_characters += len(decoder.decode(piece, final=start + LONG >= n))
        return LongText(self._origin + at, n, n_characters)

    def _raw(self, n: int) -> bytes | LongBytes:
        if self._is_kept(n):
            return self._bytes(n)
        at = self._check_left(n)
        self._file.seek(n, os.SEEK_CUR)
        return LongBytes(self._origin + at, n, n, is_text=False)
