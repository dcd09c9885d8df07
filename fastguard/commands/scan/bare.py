"""Lines of nothing but numbers: printed arrays, and values that are printed one in each line.

They have no name and no place, so all that such lines say is which of them hold NaN or Inf.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastguard.commands.scan.values import Value

FEWEST = 8
"""Lines that are taken together at least."""

_NUMBER = rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?(?:e[+-]?[0-9]++)?|nan|inf(?:inity)?)(?![\w.])"
_LINES = re.compile(
    rb"(?:(?!\s*\[\s*\d+,\s*\d+\])"  # [3, 2000] is epoch and batch
    rb"[ \t]*+\[*+[ \t]*+%b(?:(?:[ \t]*+,)?+[ \t]*+%b)*+[ \t]*+,?+[ \t]*+\]*+,?+[ \t]*+\n)++"
    % (_NUMBER, rb"(?<=[ \t,])" + _NUMBER),
    re.IGNORECASE,
)
# Each match goes on to the end of its line, so that lines are counted.
_BAD = re.compile(rb"(?:nan|inf)[^\n]*+")
_KINDS = {
    Value("", "nan"): re.compile(rb"nan[^\n]*+"),
    Value("", "-inf"): re.compile(rb"-inf[^\n]*+"),
    Value("", "inf"): re.compile(rb"(?<!-)inf[^\n]*+"),
}


class Bare(NamedTuple):
    """Lines of numbers that follow each other.

    Attributes:
        end: Where they end.
        n: How many there are.
        n_bad: How many hold NaN or Inf.
        last: Where the last of those has its NaN or Inf.
        kinds: How many hold each kind.
    """

    end: int
    n: int
    n_bad: int
    last: int
    kinds: dict[Value, int]


def bare_lines(lines: bytes, at: int) -> Bare | None:
    """The lines of numbers that begin at `at`, if there are enough; the first line is left out."""
    found = _LINES.match(lines, at)
    if found is None or (n := found[0].count(b"\n")) < FEWEST:
        return None
    begin = found[0].index(b"\n") + 1
    text = found[0].lower()
    last = max(text.rfind(b"nan"), text.rfind(b"inf"))
    if any(between in text for between in (b",", b" ", b"\t")):
        kinds = {value: len(pattern.findall(text, begin)) for value, pattern in _KINDS.items()}
        n_bad = len(_BAD.findall(text, begin))
    else:  # one value a line
        nan, inf, negative = (text.count(word, begin) for word in (b"nan", b"inf", b"-inf"))
        kinds = dict(zip(_KINDS, (nan, negative, inf - negative), strict=True))
        n_bad = nan + inf
    firsts = {value: _KINDS[value].search(text, begin) for value, m in kinds.items() if m}
    order = sorted(firsts, key=lambda value: firsts[value].start())  # type: ignore[union-attr]
    return Bare(found.end(), n - 1, n_bad, at + last, {value: kinds[value] for value in order})
