"""Parses lines that differ only in digits once.

A training loop prints the same few lines again and again: "step 100: loss nan" and "step 101: loss
nan" differ only in their place. Each line is looked up by its shape, which is the line with every
digit replaced by 0. The cached result gives the characters that are the place. Digits in a name
("loss_2") or a count ("nan iterations: 0") change the meaning of a line, so they are part of the
key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastguard.commands.scan.budget import ROW, Budget, units_of
from fastguard.commands.scan.huggingface import HuggingFace
from fastguard.commands.scan.lightning import Lightning
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.places import names_settings, where_in, without_launcher
from fastguard.commands.scan.plain import Plain, may_measure
from fastguard.commands.scan.reading import Span, Where, whole_epoch
from fastguard.commands.scan.spellings import may_have
from fastguard.commands.scan.ultralytics import Ultralytics
from fastguard.commands.scan.values import Value, nonfinite_values

SHAPE = bytes.maketrans(b"123456789", b"000000000")
"""Translation table for `bytes.translate` that gives the shape of a line."""

_OF_NAMES = re.compile(rb"[A-Za-z_][./\[#@-]?([0-9]+)")
_IN_NUMBER = re.compile(rb".{0,2}[0-9.]e[+-]?$|.?nan\.$|.?inf\.$", re.IGNORECASE | re.DOTALL)
_OF_COUNTS = re.compile(
    rb"(?:nan|(?!inf (?:step|epoch|iter|batch|loss)=)inf|finite|found"
    rb"|detected|encountered|number of|num)\w{0,12}[\w ]{0,30}[\"']?\s{0,9}"
    rb"[:=]\s{0,9}([0-9]+)"
    rb"|\b(?:found|detected|encountered|got|skipped|with|contains) ([0-9]+)\b"
    rb"|(?<![0-9.])([0-9]+)(?:/[0-9]+)?(?= (?:samples got|(?:nan|inf|non-?finite)s?"
    rb" (?:\w{1,20} ){0,2}(?:found|detected|encountered)))",
    re.IGNORECASE,
)

_POSITIVE = re.compile(rb"(?<!-)inf")
_NUMBERS = b"0123456789.,+- \t"
_CLOSERS = b")], \t"
_HAS_DIGIT = re.compile(rb"\d")
_SPACES = bytes.maketrans(b",\t", b"  ")

_MARKS = ("%", "it/s", "gpu_mem", "epoch'", 'epoch"')
"""Marks of the other dialects' lines: bars, headers, dicts."""

KEPT = 4096
"""Maximum number of cached shapes."""

LONG = 600
"""Lines of at least this many bytes are cached when their shape occurs for the second time."""

TOGETHER = 16
"""Minimum number of lines that are compared with a line at once."""

MEANT = 12
"""A line with more numbers than this in its names and counts is not cached."""


class Shape(NamedTuple):
    """What lines of one shape say.

    Attributes:
        suspect: Whether they contain NaN or Inf, as a value or as a word.
        dialect: Their dialect; None if they say nothing about a run.
        bad: Their NaN and Inf values.
        measured: Whether they report losses or norms.
        where: Which bytes give the place.
    """

    suspect: bool
    dialect: str | None = None
    bad: tuple[Value, ...] = ()
    measured: bool = False
    where: Where = Where()


class Shapes:
    """Parses lines of text, each shape once.

    Args:
        budget: The budget for parsing.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._ultralytics = Ultralytics()
        self._others = (Lightning(), HuggingFace(), Plain())
        self._known: dict[bytes, Shape | tuple[Span, ...]] = {}
        self._meant: dict[tuple[bytes, ...], Shape] = {}
        self._once: set[int] = set()  # hashes of long shapes seen once
        self._places: dict[bytes, Where] = {}

    def of(self, line: bytes) -> Shape:
        """Parses a line."""
        shape = self.known(line)
        if shape is not None:
            return shape
        self._budget.spend(units_of(line))
        short, same = shortened(line)
        shape = self._read(short)
        meant = _digits_with_a_meaning(short)
        if any(span and span[1] > same for span in (*shape.where, *meant)):
            short, shape, meant = line, self._read(line), _digits_with_a_meaning(line)
        if len(meant) <= MEANT and self._comes_again(short):
            key = short.translate(SHAPE)
            self._keep(self._known, key, meant or shape)
            if meant:
                self._keep(self._meant, (key, *[short[a:b] for a, b in meant]), shape)
        return shape

    def known(self, line: bytes) -> Shape | None:
        """The cached result for a line, or None."""
        shape = self._find(line)
        if shape is None:
            short, same = shortened(line)
            return self._find(short) if same < len(line) else None
        return shape

    def _find(self, line: bytes) -> Shape | None:
        key = line.translate(SHAPE)
        known = self._known.get(key)
        if known is None or isinstance(known, Shape):
            return known
        return self._meant.get((key, *[line[a:b] for a, b in known]))

    def _comes_again(self, line: bytes) -> bool:
        if len(line) <= LONG or (code := hash(line.translate(SHAPE))) in self._once:
            return True
        if len(self._once) >= KEPT:
            self._once.clear()
        self._once.add(code)
        return False

    def where(self, line: bytes) -> Where:
        """Which bytes name the place in a line of any kind."""
        key = line.translate(SHAPE)
        where = self._places.get(key)
        if where is None:
            self._budget.spend(ROW)
            text = text_of(line)
            where = where_in(text).in_bytes(text, line)
            self._keep(self._places, key, where)
        return where

    def _keep(self, known: dict[Any, Any], key: Any, value: Any) -> None:
        if len(known) >= KEPT:
            known.clear()
        known[key] = value

    def is_setting(self, line: bytes) -> bool:
        """Whether a line belongs to a list of settings."""
        return names_settings(text_of(line))

    def _read(self, line: bytes) -> Shape:
        text = text_of(line)
        lower = text.lower()
        if not (may_have(lower) or may_measure(text) or any(mark in lower for mark in _MARKS)):
            return Shape(False)  # its place is looked up only if it is needed
        bad, mentions = nonfinite_values(without_launcher(text))
        suspect = bool(bad) or mentions
        reading = self._ultralytics.read(text)
        if reading is not None and reading.where is None:  # a header: rows now have other names
            self._known.clear()
            self._meant.clear()
        for dialect in self._others:
            reading = reading or dialect.read(text)
        if reading is None:
            return Shape(suspect)
        where = (reading.where or Where()).in_bytes(text, line)
        bad = tuple(dict.fromkeys(reading.bad))  # lines are counted, not occurrences
        return Shape(suspect, reading.dialect, bad, reading.measured, where)


def _digits_with_a_meaning(line: bytes) -> tuple[Span, ...]:
    """The spans of the digits in names and counts, which change the meaning of a line."""
    names = [
        match.span(1)
        for match in _OF_NAMES.finditer(line)
        if not _IN_NUMBER.match(line, max(0, match.start() - 3), match.start(1))
    ]
    counts = [match.span(match.lastindex or 0) for match in _OF_COUNTS.finditer(line, 0, LONG)]
    return (*names, *counts)


def alike(lines: bytes, at: int, line: bytes, where: Where) -> bytes:
    """The lines from `at` on that differ from a line only in digits, not in names or the epoch.

    Returns:
        `TOGETHER * 2**k` lines, each with its line feed; b"" if there are fewer than `TOGETHER`.
    """
    stride = len(line) + 1
    shape = line.translate(SHAPE) + b"\n"
    end, n = at, TOGETHER
    fixed: Sequence[Span] | None = None
    while lines[end : end + n * stride].translate(SHAPE) == shape * n:
        text = lines[end : end + n * stride]
        fixed = _fixed_digits(line, where) if fixed is None else fixed
        if any(text[i::stride].count(line[i]) != n for span in fixed for i in range(*span)):
            break
        end += n * stride
        n = (end - at) // stride
    return lines[at:end]


def _fixed_digits(line: bytes, where: Where) -> list[Span]:
    """The spans of digits that are the same in all lines of a run: names, counts and the epoch."""
    fixed = [*_digits_with_a_meaning(line)]
    if where.epoch is not None:
        fixed.append((where.epoch[0], where.epoch[0] + len(whole_epoch(where, line))))
    return fixed


def shortened(line: bytes) -> tuple[bytes, int]:
    """Shortens the array at the end of a line to fewer values with the same meaning.

    Returns:
        The line, and the number of unchanged bytes at its beginning.

    Example:
        >>> shortened(b"grads [0.5, nan, 0.25, 0.5, 0.1, inf, nan, nan, nan, 3.5]")
        (b'grads [0, nan, inf, nan, 0]', 7)
    """
    lower = line.lower()
    nan, inf = lower.find(b"nan"), lower.find(b"inf")
    at = nan if inf < 0 or 0 <= nan < inf else inf
    array = lower[at:].rstrip(_CLOSERS) if at >= 0 else b""
    if not _is_array(array):
        return line, len(line)
    signed = lower[at - 1 : at] in (b"-", b"+")
    at -= signed
    first = lower[at : at + 3 + signed]
    array = lower[at : at + len(array) + 1].rstrip(_CLOSERS)
    same = _before_numbers(lower[:at])
    rest = array[3:]
    places = {kind: rest.find(kind) for kind in (b"nan", b"-inf")}
    infinite = _POSITIVE.search(rest)
    places[b"inf"] = infinite.start() if infinite else -1
    cells = [
        line[at : at + len(first)],
        *sorted((k for k in places if places[k] >= 0), key=places.__getitem__),
    ]
    if same < at:
        cells.insert(0, b"0")
    if array[-1:] in b"0123456789.":
        cells.append(b"0")
    between = b", " if b"," in line[same : at + len(array)] else b" "
    short = line[:same] + between.join(cells) + line[at + len(array) :]
    return short, len(line) if short == line else same


def _is_array(text: bytes) -> bool:
    """Whether a text consists only of numbers, with NaN or Inf among them."""
    cells = b" " + text.translate(_SPACES).replace(b"e-", b"00") + b" "
    words = cells.count(b"nan") + cells.count(b"inf")
    return (
        words > 0
        and len(cells.translate(None, b"0123456789.+- ")) == 3 * words
        and words == cells.count(b"nan ") + cells.count(b"inf ")
        and words == cells.count(b" nan") + cells.count(b" inf") + cells.count(b"-inf")
    )


def _before_numbers(head: bytes) -> int:
    """Where the numbers at the end of a text begin."""
    same = len(head.replace(b"e-", b"00").rstrip(_NUMBERS))
    while head[same : same + 1].isspace():
        same += 1
    numbers = head[same:]
    whole = head[:same].rstrip()[-1:] not in (b"", b"[", b"(")  # words may name what follows
    return len(head) if whole or not _HAS_DIGIT.search(numbers) else same
