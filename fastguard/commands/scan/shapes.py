"""Parses lines that differ only in digits once.

A training loop prints the same few lines again and again: "step 100: loss nan" and "step 101: loss
nan" differ only in their place in the run. Each line is looked up by its shape, which is the line
with every digit set to 0. The cached result tells which characters give the place. Digits in a
name ("loss_2") or a count ("nan iterations: 0") change the meaning of a line, so they are part of
the key. A line whose shape is new is looked up by its wording, see `wording`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastguard.commands.scan.budget import ROW, WORDED, Budget, units_of
from fastguard.commands.scan.huggingface import HuggingFace
from fastguard.commands.scan.json_lines import parse
from fastguard.commands.scan.lightning import Lightning
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.places import names_settings, where_in, without_launcher
from fastguard.commands.scan.plain import Plain, may_measure
from fastguard.commands.scan.reading import Span, Where, whole_epoch
from fastguard.commands.scan.spellings import may_have
from fastguard.commands.scan.ultralytics import Ultralytics
from fastguard.commands.scan.values import Value, nonfinite_values
from fastguard.commands.scan.wording import Wording, Wordings
from fastguard.records.read_json_lines import are_records

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

ALIKE = 16
"""Minimum number of lines that are compared with one of the same shape together."""

LONG = 600
"""Lines of at least this many bytes are cached when their shape occurs for the second time."""

MEANT = 12
"""A line is not cached if its names and counts contain more numbers than this."""


class Shape(NamedTuple):
    """The parsed content of lines of one shape.

    Attributes:
        suspect: Whether they contain NaN or Inf, as a value or as a word.
        dialect: The dialect of the lines; None if they say nothing about a run.
        bad: The NaN and Inf values in the lines.
        measured: Whether they report losses or norms.
        where: The spans of the bytes that give the place.
    """

    suspect: bool
    dialect: str | None = None
    bad: tuple[Value, ...] = ()
    measured: bool = False
    where: Where = Where()


class _Cache:
    """Cached results of lines, by shape and by the digits that have a meaning."""

    def __init__(self) -> None:
        self.known: dict[bytes, Shape | tuple[Span, ...]] = {}
        self.meant: dict[tuple[bytes, ...], Shape] = {}

    def find(self, line: bytes) -> Shape | None:
        """The cached result for a line, or None."""
        key = line.translate(SHAPE)
        known = self.known.get(key)
        if known is None or isinstance(known, Shape):
            return known
        return self.meant.get((key, *[line[a:b] for a, b in known]))

    def keep(self, line: bytes, meant: tuple[Span, ...], shape: Shape) -> None:
        """Caches the result of a line; `meant` are the spans of its digits that have a meaning."""
        key = line.translate(SHAPE)
        _keep(self.known, key, meant or shape)
        if meant:
            _keep(self.meant, (key, *[line[a:b] for a, b in meant]), shape)

    def spans(self, line: bytes) -> tuple[Span, ...]:
        """The spans of the digits with a meaning in a line whose result is cached."""
        known = self.known[line.translate(SHAPE)]
        return () if isinstance(known, Shape) else known

    def clear(self) -> None:
        """Drops all results."""
        self.known.clear()
        self.meant.clear()


class Shapes:
    """Parses lines of text, each shape once.

    Args:
        budget: The budget for parsing.

    Attributes:
        generation: Number of times that all results became invalid.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._ultralytics = Ultralytics()
        self._others = (Lightning(), HuggingFace(), Plain())
        self._lines = _Cache()
        self._wordings = _Cache()
        self._wording = Wordings()
        self._once: set[int] = set()  # hashes of long shapes seen once
        self._places: dict[bytes, Where] = {}
        self.generation: int = 0

    def of(self, line: bytes) -> Shape:
        """Parses a line."""
        shape = self._lines.find(line)
        if shape is not None:
            return shape
        short, same = shortened(line)
        if same < len(line) and (shape := self._lines.find(short)) is not None:
            return shape
        shape, meant = self._of_wording(short)
        if any(span and span[1] > same for span in (*shape.where, *meant)):
            short = line
            shape, meant = self._of_wording(line)
        if len(meant) <= MEANT and self._comes_again(short):
            self._lines.keep(short, meant, shape)
        return shape

    def all_known(self, lines: Sequence[bytes]) -> list[Shape | None]:
        """The cached results for lines, found by loops in C; None for all others."""
        known, meant = self._lines.known, self._lines.meant
        keys = b"\n".join(lines).translate(SHAPE).split(b"\n")
        return [
            meant.get((key, *[line[a:b] for a, b in shape])) if type(shape) is tuple else shape
            for shape, key, line in zip(map(known.get, keys), keys, lines, strict=True)
        ]  # type: ignore[return-value]

    def _of_wording(self, line: bytes) -> tuple[Shape, tuple[Span, ...]]:
        """The result for a line, and the spans of its digits that have a meaning."""
        if b'"clip_coef"' in line and are_records([parse(line[line.find(b"{") :])]):
            self._budget.spend(units_of(line))
            return Shape(False), ()  # a record of fastguard after a prefix
        wording = self._wording.of(line)
        shape = self._wordings.find(wording.line)
        if shape is not None:
            self._budget.spend(WORDED + len(line) // 16)
            meant = self._wordings.spans(wording.line)
        else:
            self._budget.spend(units_of(line))
            if b"gpu_mem" in line.lower():  # the line is a header, whose names are kept
                return self._read(line), _digits_with_a_meaning(line)
            shape = self._read(wording.line)
            meant = _digits_with_a_meaning(wording.line)
            if len(meant) <= MEANT:
                self._wordings.keep(wording.line, meant, shape)
        if not wording.words:
            return shape, meant
        return _in_words(shape, wording), tuple(map(wording.span, meant))

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
            _keep(self._places, key, where)
        return where

    def is_setting(self, line: bytes) -> bool:
        """Whether a line belongs to a list of settings."""
        return names_settings(text_of(line))

    def _read(self, line: bytes) -> Shape:
        text = text_of(line)
        lower = text.lower()
        if not (may_have(lower) or may_measure(text) or any(mark in lower for mark in _MARKS)):
            return Shape(False)  # the place is looked up only if it is needed
        bad, mentions = nonfinite_values(without_launcher(text))
        suspect = bool(bad) or mentions
        reading = self._ultralytics.read(text)
        # a header, after which rows have other names
        if reading is not None and reading.where is None:
            self._lines.clear()
            self._wordings.clear()
            self.generation += 1
        for dialect in self._others:
            reading = reading or dialect.read(text)
        if reading is None:
            return Shape(suspect)
        where = (reading.where or Where()).in_bytes(text, line)
        # removes duplicates, since lines are counted, not occurrences
        bad = tuple(dict.fromkeys(reading.bad))
        return Shape(suspect, reading.dialect, bad, reading.measured, where)


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= KEPT:
        known.clear()
    known[key] = value


def _in_words(shape: Shape, wording: Wording) -> Shape:
    """Translates the result for a wording to the result for its line."""
    suspect, dialect, bad, measured, where = shape
    if any(where):
        where = Where(*(span and wording.span(span) for span in where))
    if bad:
        bad = tuple(dict.fromkeys([Value(wording.name(name), text) for name, text in bad]))
    return Shape(suspect, dialect, bad, measured, where)


def _digits_with_a_meaning(line: bytes) -> tuple[Span, ...]:
    """The spans of the digits in names and counts, which change the meaning of a line."""
    names = [
        match.span(1)
        for match in _OF_NAMES.finditer(line)
        if not _IN_NUMBER.match(line, max(0, match.start() - 3), match.start(1))
    ]
    counts = [match.span(match.lastindex or 0) for match in _OF_COUNTS.finditer(line, 0, LONG)]
    return (*names, *counts)


def alike(lines: bytes, at: int, line: bytes, where: Where) -> int:
    """The end of the lines from `at` on that differ from a line only in digits without a meaning.

    The digits of the epoch, of names and of counts have a meaning.
    """
    shape = line.translate(SHAPE) + b"\n"
    stride, n, factor = len(shape), ALIKE, 2
    fixed = _digits_with_a_meaning(line) if lines.startswith(line[:1], at) else ()
    if where.epoch is not None:
        fixed = (*fixed, (where.epoch[0], where.epoch[0] + len(whole_epoch(where, line))))
    while n >= ALIKE:  # twice as many lines each time, then half as many
        text = lines[at : at + n * stride]
        same = len(text) == n * stride and text.translate(SHAPE) == shape * n
        if same and all(text[i::stride].count(line[i]) == n for a, b in fixed for i in range(a, b)):
            at, n = at + n * stride, factor * n
        else:
            n, factor = n // 2, 1
    return at


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
    if len(array) < 5 and lower[at - 1 : at] == b" " and lower[:at].rstrip()[-1:].isalpha():
        return line, len(line)
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
    # if words precede, they may name what follows
    whole = head[:same].rstrip()[-1:] not in (b"", b"[", b"(")
    return len(head) if whole or not _HAS_DIGIT.search(numbers) else same
