"""Counts NaN and Inf in lines that contain only numbers, such as printed arrays.

Such lines have neither names nor places.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastguard.commands.scan.values import Value

MIN_LINES = 8
"""Minimum number of lines to process together."""

_NUMBER = rb"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+(?:e[+-]?+[0-9]++)?+|nan|inf(?:inity)?+)(?![\w.])"
_LINES = re.compile(
    rb"(?:%b\n"  # tried first, since it is twice as fast for one number per line
    rb"|(?![ \t]*+\[[ \t]*+\d+,[ \t]*+\d+\])"  # excludes [3, 2000], which is epoch and batch
    rb"[ \t]*+\[*+[ \t]*+%b(?:(?:,[ \t]*+|[ \t]++(?:,[ \t]*+)?+)%b)*+"
    rb"[ \t]*+,?+[ \t]*+\]*+,?+[ \t]*+\n)++" % ((_NUMBER,) * 3),
    re.IGNORECASE,
)
# A match extends to the end of its line, so the number of matches is the number of lines.
_BAD = re.compile(rb"(?:nan|inf)[^\n]*+")
_KINDS = {
    Value("", "nan"): re.compile(rb"nan[^\n]*+"),
    Value("", "-inf"): re.compile(rb"-inf[^\n]*+"),
    Value("", "inf"): re.compile(rb"inf(?<!-inf)[^\n]*+"),
}


class Bare(NamedTuple):
    """Consecutive lines of numbers.

    Attributes:
        end: Offset of their end.
        n: Number of lines.
        n_bad: Number of lines with NaN or Inf.
        last: Offset of the NaN or Inf in the last bad line.
        kinds: Number of lines that contain each kind of value.
    """

    end: int
    n: int
    n_bad: int
    last: int
    kinds: dict[Value, int]


def bare_lines(lines: bytes, at: int) -> Bare | None:
    """The lines of numbers after the line at `at`; None if there are too few lines."""
    found = _LINES.match(lines, at)
    if found is None or (n := found[0].count(b"\n")) < MIN_LINES:
        return None
    begin = found[0].index(b"\n") + 1
    text = found[0].lower()
    last = max(text.rfind(b"nan"), text.rfind(b"inf"))
    if any(between in text for between in (b",", b" ", b"\t")):
        kinds = {value: len(pattern.findall(text, begin)) for value, pattern in _KINDS.items()}
        n_bad = len(_BAD.findall(text, begin))
    else:  # one value per line
        nan, inf, negative = (text.count(word, begin) for word in (b"nan", b"inf", b"-inf"))
        kinds = dict(zip(_KINDS, (nan, negative, inf - negative), strict=True))
        n_bad = nan + inf
    firsts = {value: _KINDS[value].search(text, begin) for value, m in kinds.items() if m}
    order = sorted(firsts, key=lambda value: firsts[value].start())  # type: ignore[union-attr]
    return Bare(found.end(), n - 1, n_bad, at + last, {value: kinds[value] for value in order})
