"""`Cursor`: moves over the lines of a block and tracks their line numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from fastguard.commands.scan import json_lines
from fastguard.commands.scan.budget import VALUES, words_at
from fastguard.commands.scan.lines import Block
from fastguard.commands.scan.suspects import Suspects

TOGETHER = 512
"""Maximum number of JSON lines that are read together."""

_BLANK = re.compile(rb"(?:[ \t\f\v]*+(?:\n|\Z))++")
_OBJECTS = re.compile(rb"(?:\{\"[^\n]*+\n){1,%d}+" % TOGETHER)


class Batch(NamedTuple):
    """Consecutive lines.

    Attributes:
        lines: The lines without line feeds.
        starts: The offsets of the lines, and the offset of the end.
        numbers: The line numbers.
    """

    lines: list[bytes]
    starts: list[int]
    numbers: Sequence[int]


class Cursor:
    """Moves over the lines of a block.

    Args:
        block: The block.

    Attributes:
        lines: The lines, ended by line feeds only. Offsets are the same as in the block.
        size: Offset of the end of the lines.
        at: Offset of the next line.
        without_header: Offset up to which no row has a header above it.
    """

    def __init__(self, block: Block) -> None:
        self._data = data = block.data
        # Both have the same length, so offsets are valid in both.
        self.lines: bytes = (
            data.replace(b"\r\n", b" \n").replace(b"\r", b"\n") if b"\r" in data else data
        )
        self.size: int = len(data)
        self.at: int = 0
        self.without_header: int = 0
        self._number, self._counted = block.number, 0
        self._suspects: Suspects | None = None
        self._last_word = -1
        self._values: dict[re.Pattern[bytes], int] = {}

    @property
    def done(self) -> bool:
        """Whether no line is left."""
        return self.at >= self.size

    @property
    def number(self) -> int:
        """The number of the next line."""
        self._number += self._data.count(b"\n", self._counted, self.at)
        self._counted = self.at
        return self._number

    def number_at(self, place: int) -> int:
        """The line number at an offset in or after the next line."""
        return self.number + self._data.count(b"\n", self.at, place)

    def numbers(self, end: int, n: int) -> Sequence[int]:
        """The numbers of the next `n` lines, up to the offset `end`."""
        rows = self._data[self.at : end]
        first = self.number
        if b"\r" not in rows or b"\r" not in rows.replace(b"\r\n", b""):
            return range(first, first + n)
        ends = (character == b"\n" for character in re.findall(rb"\r(?!\n)|\n", rows))
        return list(accumulate(ends, initial=first))[:n]

    def skip_blank(self) -> bool:
        """Moves to the next line that is not blank; returns whether there is one."""
        if not self.done and (blank := _BLANK.match(self.lines, self.at)) is not None:
            self.at = blank.end()
        return not self.done

    def starts(self, text: bytes) -> bool:
        """Whether the next line begins with `prefix`."""
        return self.lines.startswith(text, self.at)

    def line(self) -> bytes:
        """The next line."""
        end = self.lines.find(b"\n", self.at)
        return self.lines[self.at : end if end >= 0 else self.size]

    def batch(self, size: int) -> Batch:
        """The next lines, in up to `size` bytes; at least one line."""
        end = self.lines.rfind(b"\n", self.at, self.at + size) + 1
        end = end or self.lines.find(b"\n", self.at) + 1 or self.size
        text = self.lines[self.at : end]
        starts = list(accumulate(map(len, text.splitlines(keepends=True)), initial=self.at))
        lines = text.removesuffix(b"\n").split(b"\n")
        return Batch(lines, starts, self.numbers(end, len(lines)))

    def suspect(self, *ends: re.Pattern[bytes]) -> int:
        """The offset of the next line that must be parsed or matches `ends`, or of the end."""
        return self._line_of(self.suspect_after(self.at, *ends))

    def suspect_after(self, at: int, *ends: re.Pattern[bytes]) -> int:
        """The first offset from `at` on with a suspect or a match of `ends`, or the end."""
        return self._searched.after(at, *ends)

    def value(self) -> int:
        """The offset of the next line that seems to hold a named NaN or Inf, or of the end."""
        if self._last_word < 0:
            self._last_word = int(max(words_at(self._searched.lower), default=0))
        if self._last_word < self.at:
            return self.size
        for pattern in VALUES:
            if self._values.get(pattern, -1) < self.at:
                found = pattern.search(self._searched.lower, self.at)
                self._values[pattern] = self.size if found is None else found.start()
        return self._line_of(min(self._values.values()))

    def _line_of(self, place: int) -> int:
        if place >= self.size:
            return self.size
        return max(self.at, self.lines.rfind(b"\n", self.at, place) + 1)

    @property
    def _searched(self) -> Suspects:
        if self._suspects is None:
            self._suspects = Suspects(self.lines)
        return self._suspects

    def objects(self) -> list[bytes]:
        """The next lines that begin like JSON objects; empty if the next line does not."""
        line = self.lines[self.at : self.lines.find(b"\n", self.at) + 1]
        if not line.rstrip().endswith(b"}") or not isinstance(json_lines.parse(line), dict):
            return []
        found = _OBJECTS.match(self.lines, self.at)
        assert found is not None  # the pattern matches at least the first line
        return found[0].split(b"\n")[:-1]
