"""Lines that differ in digits alone are read once.

A training loop prints the same few lines for days: "step 100: loss nan" and "step 101: loss nan"
say the same, but for the place. So each line is looked up by its shape, the line with every digit
as 0, and what is known of the shape says which characters are the place. Digits of a name
("loss_2") and of a count ("nan iterations: 0") are no place: where a shape has such, they are
looked up too.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from fastguard.commands.scan.huggingface import HuggingFace
from fastguard.commands.scan.lightning import Lightning
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.places import names_settings, where_in, without_launcher
from fastguard.commands.scan.plain import Plain, may_measure
from fastguard.commands.scan.reading import Span, Where
from fastguard.commands.scan.tokens import may_have
from fastguard.commands.scan.ultralytics import Ultralytics
from fastguard.commands.scan.values import Value, nonfinite_values

SHAPE = bytes.maketrans(b"123456789", b"000000000")
"""For `bytes.translate`: the shape of a line."""

_OF_NAMES = re.compile(rb"[A-Za-z_][./\[#@-]?([0-9]+)")
_IN_NUMBER = re.compile(rb".{0,2}[0-9.]e[+-]?$|.?nan\.$|.?inf\.$", re.IGNORECASE | re.DOTALL)
_OF_COUNTS = re.compile(
    rb"(?:nan|inf|finite|found|detected|encountered|number of|num)\w{0,12}[\w ]{0,30}[\"']?\s{0,9}"
    rb"[:=]\s{0,9}([0-9]+)"
    rb"|\b(?:found|detected|encountered|got|skipped|with|contains) ([0-9]+)\b"
    rb"|(?<![0-9.])([0-9]+)(?:/[0-9]+)?(?= (?:samples got|(?:nan|inf|non-?finite)s?"
    rb" (?:\w{1,20} ){0,2}(?:found|detected|encountered)))",
    re.IGNORECASE,
)

_MARKS = ("%", "it/s", "gpu_mem", "epoch'", 'epoch"')
"""What lines of the other dialects have: bars, heads, dicts."""

KEPT = 4096
"""Shapes that are known at one time."""

LONG = 600
"""Bytes from which a line is remembered only when it comes a second time: few do."""

MEANT = 12
"""Numbers with a meaning in a line that is remembered."""


class Shape(NamedTuple):
    """What lines of one shape say.

    Attributes:
        suspect: Whether they have NaN or Inf, as a value or as a word.
        dialect: Who wrote such lines; None: they say nothing of a run.
        bad: The values that are NaN or Inf.
        measured: Whether they tell of losses or norms.
        where: Which bytes say the place.
    """

    suspect: bool
    dialect: str | None = None
    bad: tuple[Value, ...] = ()
    measured: bool = False
    where: Where = Where()


class Shapes:
    """Reads lines of text, each shape once."""

    def __init__(self) -> None:
        self._ultralytics = Ultralytics()
        self._others = (Lightning(), HuggingFace(), Plain())
        self._known: dict[bytes, Shape | tuple[Span, ...]] = {}
        self._meant: dict[tuple[bytes, ...], Shape] = {}
        self._once: set[int] = set()  # hashes of long shapes that came once
        self._places: dict[bytes, Where] = {}

    def of(self, line: bytes) -> Shape:
        """What a line says."""
        shape = self.known(line)
        if shape is not None:
            return shape
        key = line.translate(SHAPE)
        meant = self._known.get(key)
        if meant is None or isinstance(meant, Shape):
            return self._remember(key, line)
        shape = self._read(line)
        self._keep(self._meant, (key, *[line[a:b] for a, b in meant]), shape)
        return shape

    def known(self, line: bytes) -> Shape | None:
        """What a line says, if one like it has been read."""
        key = line.translate(SHAPE)
        known = self._known.get(key)
        if known is None or isinstance(known, Shape):
            return known
        return self._meant.get((key, *[line[a:b] for a, b in known]))

    def _remember(self, key: bytes, line: bytes) -> Shape:
        shape = self._read(line)
        if len(line) > LONG and (code := hash(key)) not in self._once:
            if len(self._once) >= KEPT:
                self._once.clear()
            self._once.add(code)
            return shape
        meant = _digits_with_a_meaning(line)
        if len(meant) > MEANT:
            return shape
        self._keep(self._known, key, meant or shape)
        if meant:
            self._keep(self._meant, (key, *[line[a:b] for a, b in meant]), shape)
        return shape

    def where(self, line: bytes) -> Where:
        """Which bytes name the place in a line of any kind."""
        key = line.translate(SHAPE)
        where = self._places.get(key)
        if where is None:
            text = text_of(line)
            where = where_in(text).in_bytes(text, line)
            self._keep(self._places, key, where)
        return where

    def _keep(self, known: dict[Any, Any], key: Any, value: Any) -> None:
        if len(known) >= KEPT:
            known.clear()
        known[key] = value

    def is_setting(self, line: bytes) -> bool:
        """Whether a line is one of a list of settings."""
        return names_settings(text_of(line))

    def _read(self, line: bytes) -> Shape:
        text = text_of(line)
        lower = text.lower()
        if not (may_have(lower) or may_measure(text) or any(mark in lower for mark in _MARKS)):
            return Shape(False)  # its place is looked for if it is asked
        bad, mentions = nonfinite_values(without_launcher(text))
        suspect = bool(bad) or mentions
        reading = self._ultralytics.read(text)
        if reading is not None and reading.where is None:  # a head: rows have other names now
            self._known.clear()
            self._meant.clear()
        for dialect in self._others:
            reading = reading or dialect.read(text)
        if reading is None:
            return Shape(suspect)
        where = (reading.where or Where()).in_bytes(text, line)
        return Shape(suspect, reading.dialect, reading.bad, reading.measured, where)


def _digits_with_a_meaning(line: bytes) -> tuple[Span, ...]:
    """Where the digits of names and of counts are: other digits there are another line."""
    names = [
        match.span(1)
        for match in _OF_NAMES.finditer(line)
        if not _IN_NUMBER.match(line, max(0, match.start() - 3), match.start(1))
    ]
    counts = [match.span(match.lastindex or 0) for match in _OF_COUNTS.finditer(line, 0, LONG)]
    return (*names, *counts)
