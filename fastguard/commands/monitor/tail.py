"""The end of a file, found without reading its beginning."""

from __future__ import annotations

import os
from collections.abc import Iterator

BLOCK = 1 << 20
"""Bytes read at once, and the length from which a line is no record but damage."""


def blocks_backwards(file: int, end: int, size: int = BLOCK) -> Iterator[tuple[int, bytes]]:
    """The bytes `[0, end)` of a file, last block first, each as `(offset, bytes)`.

    Args:
        file: A descriptor that can be read at any offset.
        end: Where to begin, going back.
        size: Bytes of a block.
    """
    while end > 0:
        start = max(0, end - size)
        yield start, os.pread(file, end - start, start)
        end = start


def whole_lines_backwards(file: int, end: int, size: int = BLOCK) -> Iterator[bytes]:
    """The bytes `[0, end)`, last block first, cut where lines begin.

    A line longer than `size` comes in pieces, which parse as damage; memory stays within 2 blocks.
    """
    rest = b""
    for start, block in blocks_backwards(file, end, size):
        block += rest
        cut = block.find(b"\n") + 1 if start else 0  # what is before belongs to an earlier line
        if start and (cut == 0 or cut > size):
            cut = 0  # one line longer than a block
        yield block[cut:]
        rest = block[:cut]


def start_of_last_lines(file: int, end: int, n: int, size: int = BLOCK) -> tuple[int, int]:
    """Where the last `n` lines of the bytes `[0, end)` begin, and how many there are up to `n`.

    A last line without its newline counts.
    """
    found = 0
    newline_before = end - 1  # the newline that ends the last line has no line after it
    for start, block in blocks_backwards(file, end, size):
        in_block = block.count(b"\n", 0, max(0, newline_before - start))
        if found + in_block < n:
            found += in_block
            continue
        at = min(len(block), newline_before - start)
        for _ in range(n - found):
            at = block.rfind(b"\n", 0, at)
        return start + at + 1, n
    return 0, found + (end > 0)


class Lines:
    """Joins chunks of bytes to lines; one that grows beyond `BLOCK` is given up and counted.

    Attributes:
        overlong: How many lines were given up.
    """

    def __init__(self) -> None:
        self.overlong = 0
        self._rest = b""
        self._dropping = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their newlines."""
        first, newline, others = chunk.partition(b"\n")
        if not newline:
            self._keep(first)
            return []
        whole = [] if self._dropping else [self._rest + first]
        self._dropping, self._rest = False, b""
        *lines, last = others.split(b"\n")
        self._keep(last)
        return whole + lines

    def flush(self) -> bytes:
        """What there is of a line whose end has not come; forgotten here."""
        rest, self._rest, self._dropping = self._rest, b"", False
        return rest

    def _keep(self, part: bytes) -> None:
        if self._dropping:
            return
        self._rest += part
        if len(self._rest) > BLOCK:
            self.overlong += 1
            self._dropping, self._rest = True, b""
