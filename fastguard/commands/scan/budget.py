"""Bounds the work that a scan spends on single lines, so that a log of any content is read fast.

Most lines are skipped, read many at a time, or look like one that was analysed before. A log whose
lines contain NaN in ever new wording has none of these: analysed line by line, it would be read at
0.2 to 0.9 MB/s. So every log may spend `FIRST` units, and one more per `BYTES_PER_UNIT` bytes of
it. Once they are spent, the rest of the block of 1 MiB is only searched for NaN and Inf, and the
lines that contain one are counted; the next block has units of its own again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastguard.commands.scan.lines import Line, text_of

BYTES_PER_UNIT = 64
"""A unit is about a microsecond of work on one core, so lines alone may take 16 ms per MiB."""

NEW = 96
"""Units for the analysis of a line unlike all that are remembered; see `units_of`."""

NEW_TOKEN = 24
"""Further units for each NaN or Inf in it, and for each of its bytes one."""

KNOWN = 8
"""Units for a line that is looked at individually, for the look alone."""

IN_RUN = 2
"""Number of such lines per unit, right after a bad one."""

ROW = 16
"""Units for one row of a table or one JSON object that is read individually."""

PLACED = 8
"""Units for the place of a bad row among rows that are read together."""

VALUE = 2
"""Units for each NaN or Inf of such a row."""

JUDGED = 12
"""Units for a loss or norm that is compared with a threshold individually."""

FIRST = 700_000

RESERVED = 64 * NEW
"""Units per block that are kept for the first finding: see `Budget.reserve`."""

EXCERPT = 200
"""Maximum number of characters kept of a line."""

# Slightly more than tokens.TOKEN. Each match extends to the end of its line, to count lines.
NONFINITE = re.compile(
    rb"(?:(?:nan|inf)(?<![a-z0-9_]...)(?:inity|inite)?|1\.#[a-z]+|non[ -]?finite|not a number)"
    rb"(?![a-z0-9_])[^\n]*+"
)
_BLANK = re.compile(rb"\n[ \t\f\v\r]*+(?=\n|\Z)")
_NAN = rb"[+-]?(?:nan|inf(?:inity)?|1\.#[a-z]+)(?![a-z0-9_/])"
VALUES = (  # three, because each is searched by its first characters
    re.compile(rb"[:=][ \t\"'(\[]{0,9}" + _NAN),
    re.compile(rb"loss[a-z0-9_]{0,20}[\"']?(?: is| became| turned)?[ \t\"'(\[]{1,9}" + _NAN),
    re.compile(rb"norm[a-z0-9_]{0,20}[\"']?(?: is| became| turned)?[ \t\"'(\[]{1,9}" + _NAN),
)
"""Lower-case text that looks like a NaN or Inf with a name."""


@dataclass(slots=True)
class Counted:
    """Lines that were only searched.

    Attributes:
        first_line, last_line: Line numbers; lines between them may have been analysed.
        n_lines: Number of lines.
        n_nonfinite: Number of those lines that contain NaN or Inf, as a value or as a word.
        first: The first of them.
    """

    first_line: int = 0
    last_line: int = 0
    n_lines: int = 0
    n_nonfinite: int = 0
    first: Line | None = None

    def add(self, number: int, lines: bytes, last_line: int) -> int:
        """Adds consecutive lines with these first and last numbers; returns how many."""
        n = n_lines(lines)
        if not n:
            return 0
        self.first_line = self.first_line or number
        self.last_line = last_line
        self.n_lines += n
        lower = lines.lower()
        self.n_nonfinite += len(NONFINITE.findall(lower))
        if self.first is None and (found := NONFINITE.search(lower)) is not None:
            begin = lines.rfind(b"\n", 0, found.start()) + 1
            line = lines[max(begin, found.start() - EXCERPT // 2) : found.end()][:EXCERPT]
            at = number + lines.count(b"\n", 0, begin)
            self.first = Line(at, " ".join(text_of(line).split()))
        return n


def units_of(line: bytes) -> int:
    """Units for the analysis of a line unlike all that are remembered."""
    lower = line.lower()
    return NEW + NEW_TOKEN * (lower.count(b"nan") + lower.count(b"inf")) + len(line)


def n_lines(lines: bytes) -> int:
    """The number of lines that are not blank."""
    if not lines or lines[:1].isspace():
        return sum(map(bool, map(bytes.strip, lines.split(b"\n"))))
    return 1 + lines.count(b"\n") - len(_BLANK.findall(lines))


class Budget:
    """Units of work that a log may still spend.

    Args:
        unlimited: Analyse every line, however long that takes.
    """

    def __init__(self, *, unlimited: bool = False) -> None:
        self._unlimited = unlimited
        self._left = FIRST
        self._reserved = 0

    def earn(self, n_bytes: int) -> None:
        """Adds the units of the next bytes of the log."""
        self._left += n_bytes // BYTES_PER_UNIT
        self._reserved = RESERVED

    def spend(self, units: int) -> None:
        """Spends units. More may be spent than are left; the next bytes pay the debt."""
        self._left -= units

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._left < 0 and not self._unlimited

    def reserve(self) -> bool:
        """Whether one more line may be analysed because it may be the first finding."""
        self._reserved -= NEW
        return self._reserved >= 0
