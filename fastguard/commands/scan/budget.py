"""Bounds the time that a scan spends on single lines.

Most lines are skipped, read many at a time, or resemble a line that was analyzed before. If a log
has NaN in wording that never repeats, each line must be analyzed, at 0.3 to 5 MB/s. Therefore
each log has a budget: `FIRST` units of work, plus one per `BYTES_PER_UNIT` bytes. When the budget
is spent, the rest of the current block of 1 MiB is only searched for NaN and Inf, and lines that
contain one are counted. The next block earns new units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fastguard.commands.scan.lines import Line, text_of

BYTES_PER_UNIT = 128
"""A unit is about one microsecond on one core, so 1 MiB earns 8 ms of work."""

NEW = 96
"""Units for analyzing a line whose shape is not cached; see `units_of`."""

NEW_TOKEN = 24
"""Additional units for each NaN or Inf in the line; each byte costs one more."""

WORDED = 24
"""Units for a line whose wording is cached but whose shape is not; each 16 bytes cost one more."""

KNOWN = 8
"""Units for handling a line individually, without analyzing it."""

IN_RUN = 2
"""Number of lines per unit, for lines that continue a run of bad lines."""

ROW = 16
"""Units for one row of a table or one JSON object that is read individually."""

PLACED = 8
"""Units for finding the place of a bad row among rows that are read together."""

VALUE = 2
"""Units for each NaN or Inf in such a row."""

JUDGED = 12
"""Units for a loss or norm that is compared with a threshold individually."""

FIRST = 150_000

RESERVED = 64 * NEW
"""Units per block that are reserved for the first finding; see `Budget.reserve`."""

EXCERPT = 200
"""Maximum number of characters kept of a line."""

_WORDS = (
    *(b"nan", b"inf", b"infinity", b"infinite", b"1.#inf", b"1.#ind", b"1.#qnan", b"1.#snan"),
    *(b"nonfinite", b"non-finite", b"non finite", b"not a number"),
)
"""Match slightly more than spellings.TOKEN."""

_IN_WORD = np.zeros(256, bool)
_IN_WORD[[*b"abcdefghijklmnopqrstuvwxyz0123456789_"]] = True
_BLANK = re.compile(rb"\n[ \t\f\v\r]*+(?=\n|\Z)")
_NAN = rb"[+-]?(?:nan|inf(?:inity)?|1\.#[a-z]+)(?![a-z0-9_/])"
VALUES = (  # separate patterns, since `re` is faster if the first character is fixed
    re.compile(rb"[:=][ \t\"'(\[]{0,9}" + _NAN),
    re.compile(rb"loss[a-z0-9_]{0,20}[\"']?(?: is| became| turned)?[ \t\"'(\[]{1,9}" + _NAN),
    re.compile(rb"norm[a-z0-9_]{0,20}[\"']?(?: is| became| turned)?[ \t\"'(\[]{1,9}" + _NAN),
)
"""Patterns of lower-case text in which NaN or Inf follows a name."""


@dataclass(slots=True)
class Counted:
    """Lines that were only searched.

    Attributes:
        first_line, last_line: Line numbers. Some lines between them may have been analyzed.
        n_lines: Number of lines.
        n_nonfinite: Number of lines that contain NaN or Inf, as a value or as a word.
        first: The first of these lines.
    """

    first_line: int = 0
    last_line: int = 0
    n_lines: int = 0
    n_nonfinite: int = 0
    first: Line | None = None

    def add(self, number: int, lines: bytes, last_line: int) -> int:
        """Adds consecutive lines, given the first and last line number; returns their number."""
        n = n_lines(lines)
        if not n:
            return 0
        self.first_line = self.first_line or number
        self.last_line = last_line
        self.n_lines += n
        lower = lines.lower()
        words = words_at(lower)
        self.n_nonfinite += n_lines_of(lower, words)
        if self.first is None and words.size:
            at = int(words[0])
            begin = lines.rfind(b"\n", 0, at) + 1
            line = lines[max(begin, at - EXCERPT // 2) :][:EXCERPT].partition(b"\n")[0]
            at = number + lines.count(b"\n", 0, begin)
            self.first = Line(at, " ".join(text_of(line).split()))
        return n


def words_at(lower: bytes) -> np.ndarray:
    """The offsets of words for NaN and Inf in lower-case text, in ascending order."""
    text = np.frombuffer(b"\n%b\n" % lower, np.uint8)
    found = [np.zeros(0, np.int64)]
    for word in filter(lower.__contains__, _WORDS):
        n = len(word)
        same = text[1:-n] == word[0]
        for i in range(1, n):
            same &= text[1 + i : len(text) - n + i] == word[i]
        at = np.flatnonzero(same)
        found.append(at[~(_IN_WORD[text[at]] | _IN_WORD[text[at + n + 1]])])
    return np.sort(np.concatenate(found))


def n_lines_of(text: bytes, offsets: np.ndarray) -> int:
    """The number of different lines at these offsets, which are in ascending order."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return len(np.unique(np.searchsorted(ends, offsets)))


def units_of(line: bytes) -> int:
    """The units for analyzing a line whose shape is not cached."""
    lower = line.lower()
    return NEW + NEW_TOKEN * (lower.count(b"nan") + lower.count(b"inf")) + len(line)


def n_lines(lines: bytes) -> int:
    """The number of lines that are not blank."""
    if not lines or lines[:1].isspace():
        return sum(map(bool, map(bytes.strip, lines.split(b"\n"))))
    return 1 + lines.count(b"\n") - len(_BLANK.findall(lines))


class Budget:
    """The units of work that are left for a log.

    Args:
        unlimited: Whether to analyze every line without a bound.
    """

    def __init__(self, *, unlimited: bool = False) -> None:
        self._unlimited = unlimited
        self._left = FIRST
        self._reserved = 0

    def earn(self, n_bytes: int) -> None:
        """Adds the units for the next bytes of the log."""
        self._left += n_bytes // BYTES_PER_UNIT
        self._reserved = RESERVED

    def spend(self, units: int) -> None:
        """Spends units. The balance may become negative; the next bytes pay it back."""
        self._left -= units

    @property
    def spent(self) -> bool:
        """Whether no units are left."""
        return self._left < 0 and not self._unlimited

    def reserve(self) -> bool:
        """Whether one more line may be analyzed because it may be the first finding."""
        self._reserved -= NEW
        return self._reserved >= 0
