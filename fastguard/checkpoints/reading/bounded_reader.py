"""Reads the bytes of a pickle within a budget of memory and time.

A length in a pickle is not trusted: it is compared with the size of the file before anything is
allocated, and all bytes read are charged to the budget.
"""

from __future__ import annotations

import codecs
import os
from typing import IO

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inert_values import LongBytes, LongText

BUDGET = 400_000_000
"""Approximate bytes of memory that the pickles of one file may take. Work counts as bytes too: one
byte per 3 to 4 ns. The allowance grows by 80 bytes per byte of pickle, up to three times this
number, which is enough for 100,000 tensors.
"""
_SHORT_COST, _LINE_COST = 100, 100  # cost of reading a text or bytes object, or a line
SHORT, LONG, KEPT = 4096, 16 << 20, 64 << 20
"""Text and bytes (such as the data of numpy arrays) of up to 4 kB are kept in memory. Longer values
are left in the file if they are over 16 MB, or if more than 64 MB would be kept in total.
"""
_LINE = 1 << 20  # bytes; the longest argument of a protocol 0 opcode
_DIGITS = 5000


class BoundedReader:
    """Reads the arguments of opcodes; see the module docstring.

    Args:
        file: Open for reading, at the start of the pickle.
        origin: Byte offset of `file` within the whole file, if it is a part of one.
        spent: The part of the budget that earlier pickles in the same file used.
    """

    def __init__(self, file: IO[bytes], origin: int = 0, spent: int = 0) -> None:
        self.file = file
        self._origin = origin
        at = file.tell()
        n_bytes = file.seek(0, os.SEEK_END) - file.seek(at)
        self._allowed = BUDGET + min(80 * n_bytes, 2 * BUDGET)
        self._budget = self._allowed - spent
        self._kept = 0

    @property
    def spent(self) -> int:
        """Returns the part of the budget that this pickle and earlier ones used."""
        return self._allowed - self._budget

    def charge(self, n_bytes: int) -> None:
        """Charges work to the budget; the next step fails if the budget is used up."""
        self._budget -= n_bytes

    def read_bytes(self, n: int) -> bytes:
        """Reads `n` bytes."""
        if n < 0:
            raise ValueError("negative length")
        # Text takes up to four bytes per character in memory, in addition to its stored form.
        self._budget -= _SHORT_COST + 5 * n
        if n > SHORT:  # `read` allocates before it reads, so the size is checked first
            self._check_left(n)
            if self._budget < 0:
                raise DamagedFile(
                    f"the pickle has a value of {n:,} bytes, too large for a checkpoint"
                )
        raw = self.file.read(n)
        if len(raw) < n:
            raise DamagedFile("the pickle ends too soon")
        return raw

    def _check_left(self, n: int) -> int:
        """Returns the position in the file after checking that `n` more bytes follow."""
        at = self.file.tell()
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(at)
        if n > end - at:
            raise DamagedFile("the pickle ends too soon")
        return at

    def read_line(self) -> bytes:
        """Reads a line."""
        raw = self.file.readline(_LINE)
        if not raw.endswith(b"\n"):
            raise DamagedFile("the pickle has a line without end")
        self.charge(_LINE_COST + 3 * len(raw))
        return raw[:-1]

    def read_digits(self) -> bytes:
        """Reads a line with a number."""
        raw = self.read_line()
        if len(raw) > _DIGITS:
            raise DamagedFile(f"the pickle has a number of {len(raw):,} digits")
        self.charge(3 * len(raw))  # parsing takes quadratic time
        return raw

    def _is_kept(self, n: int) -> bool:
        """Whether text or bytes are read now instead of being left in the file."""
        if n <= SHORT:
            return True
        if n > LONG or self._kept + n > KEPT:
            return False
        self._kept += n
        return True

    def read_text(self, n: int) -> str | LongText:
        """Reads UTF-8 text of `n` bytes."""
        if n <= SHORT or self._is_kept(n):
            return self.read_bytes(n).decode("utf-8", "surrogatepass")
        at, n_characters = self._check_left(n), 0
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        for start in range(0, n, LONG):
            piece = self.file.read(min(LONG, n - start))
            n_characters += len(decoder.decode(piece, final=start + LONG >= n))
        return LongText(self._origin + at, n, n_characters)

    def read_raw(self, n: int) -> bytes | LongBytes:
        """Reads `n` bytes, or leaves them in the file."""
        if self._is_kept(n):
            return self.read_bytes(n)
        at = self._check_left(n)
        self.file.seek(n, os.SEEK_CUR)
        return LongBytes(self._origin + at, n, n, is_text=False)
