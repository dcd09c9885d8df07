"""A log of any size, encoding and terminal as clean lines.

Making a Python object of each line takes longer than looking for a NaN in all of them, so a log
comes in blocks of whole lines.
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
"""A line longer than this is cut, at a space if there is one."""

# Colours, cursor movements, window titles: ECMA-48 control sequences and the two-byte ones.
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\r\n]*(?:\x07|\x1b\\)|[@-Z\\-_])")

_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Line(NamedTuple):
    """A line of a log.

    Attributes:
        number: Line feeds before it, plus 1: what an editor calls its number. All that a progress
            bar draws over itself with carriage returns has the same.
        text: Without control sequences.
    """

    number: int
    text: str


class Block(NamedTuple):
    """Lines that follow each other.

    Attributes:
        number: The number of the first.
        data: UTF-8 where the log is, without control sequences; its line feeds and carriage returns
            are those of the log.
    """

    number: int
    data: bytes


def text_of(line: bytes) -> str:
    """A line as text: UTF-8, or Latin-1 if it is not, in which no byte is an error."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a log; a carriage return ends one too. Blank ones are left out.

    Raises:
        OSError, EOFError, NotTextError: See `read_blocks`.
    """
    for number, data in read_blocks(file):
        for line in data.split(b"\n"):
            for drawn in line.split(b"\r"):
                if drawn and not drawn.isspace():
                    yield Line(number, drawn.decode(errors="replace"))
            number += 1


def read_blocks(file: BinaryIO) -> Iterator[Block]:
    """A log in blocks of whole lines. Memory does not grow with the file.

    gzip is recognised by its first bytes, UTF-16 (what PowerShell's `>` writes) by its mark.

    Args:
        file: Open for reading; need not be seekable.

    Raises:
        OSError: It cannot be read, or is damaged gzip.
        EOFError: It is gzip that ends too soon.
        NotTextError: It is binary, or compressed otherwise than with gzip.
    """
    number, rest = 1, b""
    try:
        for chunk in _utf8(file):
            data = rest + chunk
            # A progress bar may go on for gigabytes without a line feed.
            end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
            whole, rest = data[:end], data[end:]
            if whole:
                yield _block(number, whole)
                number += whole.count(b"\n")
            while len(rest) > LONGEST:
                end = _cut(rest)
                yield _block(number, rest[:end])
                rest = rest[end:]
    except (OSError, EOFError):  # what came before the damage is told first
        if rest:
            yield _block(number, rest)
        raise
    if rest:
        yield _block(number, rest)


def _block(number: int, data: bytes) -> Block:
    return Block(number, _ANSI.sub(b"", data) if b"\x1b" in data else data)


def _cut(line: bytes) -> int:
    """Where a line that is too long is cut: behind a space, and never in a character."""
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
    """A file whose first bytes have been read already, for a reader that wants to see them."""

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self._first, self._file = first, file

    def read(self, n: int = -1) -> bytes:
        if not self._first:
            return self._file.read(n)
        n = len(self._first) if n < 0 else n
        taken, self._first = self._first[:n], self._first[n:]
        return taken
