"""Reads a log of any size and encoding as clean lines, without terminal control sequences.

A log is read in blocks of whole lines, because creating a Python object per line takes longer than
searching a block for NaN.
"""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fastguard.commands.scan.foreign import refuse_foreign

CHUNK = 1 << 20
LONGEST = 1 << 16
"""Longer lines are split in parts, at a space if possible."""

# Colors, cursor movements, window titles: ECMA-48 and two-byte control sequences.
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\r\n]*(?:\x07|\x1b\\)|[@-Z\\-_])")

_INFINITY_SIGN = "\u221e".encode()
_WIDE = re.compile("[\uff0b\uff0d\uff0e\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]+")
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}

_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Line(NamedTuple):
    """A line of a log.

    Attributes:
        number: Line number as in an editor (line feeds before it, plus 1). All redraws of a
            progress bar with carriage returns share one number.
        text: The line without control sequences.
    """

    number: int
    text: str


class Block(NamedTuple):
    """Consecutive lines.

    Attributes:
        number: Number of the first line.
        data: The bytes without control sequences, in UTF-8 if the log is UTF-8. Line feeds and
            carriage returns are kept. The infinity sign is replaced with "inf", and full-width
            letters and digits by ASCII.
    """

    number: int
    data: bytes


def text_of(line: bytes) -> str:
    """Decodes a line as UTF-8, or else as Latin-1, which never fails."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def read_blocks(file: BinaryIO) -> Iterator[Block]:
    """Yields a log in blocks of whole lines. Memory does not grow with the file.

    Detects gzip by its first bytes, and UTF-16 (written by PowerShell's `>`) by its mark.

    Args:
        file: Binary file, open for reading; need not be seekable.

    Raises:
        OSError: The file cannot be read, or is damaged gzip.
        EOFError: The file is truncated gzip.
        NotTextError: The file is binary, or compressed with something other than gzip.
    """
    number, rest = 1, b""
    try:
        for chunk in _utf8(file):
            data = rest + chunk
            # A progress bar may write gigabytes without a line feed.
            end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
            whole, rest = data[:end], data[end:]
            if whole:
                yield _block(number, whole)
                number += whole.count(b"\n")
            while len(rest) > LONGEST:
                end = _cut(rest)
                yield _block(number, rest[:end])
                rest = rest[end:]
    except (OSError, EOFError):  # yields the data before the damage, then raises the error
        if rest:
            yield _block(number, rest)
        raise
    if rest:
        yield _block(number, rest)


def _block(number: int, data: bytes) -> Block:
    data = _ANSI.sub(b"", data) if b"\x1b" in data else data
    data = data.replace(_INFINITY_SIGN, b"inf")
    return Block(number, _narrow(data) if b"\xef\xbc" in data or b"\xef\xbd" in data else data)


def _narrow(data: bytes) -> bytes:
    """Writes full-width letters, digits and signs, as in "ＮａＮ", in ASCII."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data
    return _WIDE.sub(lambda wide: wide[0].translate(_NARROW), text).encode()


def _cut(line: bytes) -> int:
    """Where to split a line that is too long: after a space, never within a character."""
    if end := line.rfind(b" ", 0, LONGEST) + 1:
        return end
    end = len(line)
    while end > 1 and line[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > 1 and line[end - 1] >= 0xC0 else len(line)


def _utf8(file: BinaryIO) -> Iterator[bytes]:
    chunks = _chunks(file)
    first = next(chunks, b"")
    encoding = next((name for bom, name in _BOMS.items() if first.startswith(bom)), None)
    if encoding == "utf-16":
        decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        yield decoder.decode(first).encode(errors="replace")
        for chunk in chunks:
            yield decoder.decode(chunk).encode(errors="replace")
        yield decoder.decode(b"", final=True).encode(errors="replace")
        return
    if encoding is None:
        refuse_foreign(first)
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from chunks


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    first = file.read(CHUNK)
    if first.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=_Rejoined(first, file)) as unpacked:  # type: ignore[arg-type]
            while chunk := unpacked.read1(CHUNK):
                yield chunk
        return
    while first:
        yield first
        first = file.read(CHUNK)


class _Rejoined:
    """A binary file that returns bytes which were already read once more."""

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self._first, self._file = first, file

    def read(self, n: int = -1) -> bytes:
        if not self._first:
            return self._file.read(n)
        n = len(self._first) if n < 0 else n
        taken, self._first = self._first[:n], self._first[n:]
        return taken
