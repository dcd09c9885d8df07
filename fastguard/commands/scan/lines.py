"""A log of any size, encoding and terminal as clean lines."""

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
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")

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


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a log; a carriage return ends one too. Memory does not grow with the file.

    gzip is recognised by its first bytes, UTF-16 (what PowerShell's `>` writes) by its mark; all
    other text is read as UTF-8, in which no byte is an error.

    Args:
        file: Open for reading; need not be seekable.

    Raises:
        OSError: It cannot be read, or is damaged gzip.
        EOFError: It is gzip that ends too soon.
        NotTextError: It is binary, or compressed otherwise than with gzip.
    """
    number, rest = 1, ""
    for text in _decoded(file):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield from _drawn(number, line)
            number += 1
        if "\r" in rest:  # a progress bar may go on for gigabytes without a line feed
            drawn, _, rest = rest.rpartition("\r")
            yield from _drawn(number, drawn)
        if len(rest) > LONGEST:
            end = rest.rfind(" ") + 1 or len(rest)
            yield from _drawn(number, rest[:end])
            rest = rest[end:]
    yield from _drawn(number, rest)


def _drawn(number: int, line: str) -> Iterator[Line]:
    for text in line.split("\r") if "\r" in line else (line,):
        if "\x1b" in text:
            text = _ANSI.sub("", text)
        if text and not text.isspace():
            yield Line(number, text)


def _decoded(file: BinaryIO) -> Iterator[str]:
    chunks = _chunks(file)
    first = next(chunks, b"")
    encoding = next((name for bom, name in _BOMS.items() if first.startswith(bom)), None)
    if encoding is None:
        refuse_foreign(first)
        encoding = "utf-8"
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    yield decoder.decode(first)
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


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
