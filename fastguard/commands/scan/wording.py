"""Reduces lines to their wording, so that lines which differ in words without meaning share one.

"alexnet block loss nan" and "resnet stem loss nan" differ only in names. Words that no pattern of
the scan contains are replaced with numbered placeholders. The result, the wording, is parsed
instead of the line; `Wording.name` and `Wording.span` translate the result back to the words of the
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from fastguard.commands.scan import (
    columns,
    huggingface,
    lightning,
    names,
    places,
    plain,
    sentences,
    spellings,
    ultralytics,
    values,
    vocabulary,
)
from fastguard.commands.scan.reading import Span

KEPT = 1 << 16
"""Maximum number of words whose placeholders are cached."""

_GRAMMAR = (
    *(columns, huggingface, lightning, names, places, plain),
    *(sentences, spellings, ultralytics, values, vocabulary),
)
_WORD = re.compile(rb"([A-Z]?[a-z]{2,}|[A-Z]{3,}(?![A-Za-z]))")
_LONG = 12
"""Longer words are kept, since some patterns limit the length of a word."""

_NOT_LITERAL = re.compile(r"\\.|\(\?P<\w+>|\[[^\]]*\]")
_LITERAL = re.compile(r"([a-z]+)(\??)")
_ANYWHERE = re.compile(r"nan|inf|finit|loss|norm|acc|ppl|mse|mae|err")
"""Some patterns match these strings even within a word."""

# Names are recognized by these endings, so placeholders keep the endings.
_ENDINGS = ("ing", "ed", "")
_NUMBERS = tuple(map("".join, product("bcdfghjkpvwxz", repeat=2)))
_HOLDER = re.compile(r"(?:Q[B-Z]{2}|(?:Q|(?<![a-z])q)[b-z]{2}(?:ing|ed)?)(?![a-z])")
_HOLDER_BYTES = re.compile(_HOLDER.pattern.encode())
_INDEX = {number: i for i, number in enumerate(_NUMBERS)}


def _texts(value: object) -> Iterator[str]:
    """Yields the patterns and words in a constant of a module."""
    if isinstance(value, re.Pattern):
        yield value.pattern if isinstance(value.pattern, str) else value.pattern.decode()
    elif isinstance(value, str):
        yield value
    elif isinstance(value, tuple | frozenset):
        for one in value:
            yield from _texts(one)


_LITERALS = frozenset(
    literal
    for module in _GRAMMAR
    for name, value in vars(module).items()
    if not name.startswith("__")
    for text in _texts(value)
    for whole, optional in _LITERAL.findall(_NOT_LITERAL.sub(" ", text).lower())
    for literal in (whole, whole.removesuffix(whole[-1] * len(optional)))
)
_STEMS = tuple(one for one in _LITERALS if len(one) > 2 and one not in _ENDINGS)
"""Some literals are only the start of a word, as in "skipp(?:ed|ing)" and "param\\w*"."""

_FIRST, _LAST = {stem[:3] for stem in _STEMS}, {stem[-3:] for stem in _STEMS}


def _has_meaning(word: str) -> bool:
    """Whether a pattern of the scan may depend on a word, in lower case."""
    return (
        len(word) > _LONG
        or word in _LITERALS
        or (word[:3] in _FIRST and word.startswith(_STEMS))
        or (word[-3:] in _LAST and word.endswith(_STEMS))
        or _ANYWHERE.search(word) is not None
    )


def _numbered(first: str, ending: str) -> tuple[bytes, ...]:
    return tuple(f"{first}{number}{ending}".encode() for number in _NUMBERS)


_PLACEHOLDERS = {(first, end): _numbered(first, end) for first in "qQ" for end in _ENDINGS}
_UPPER = tuple(map(bytes.upper, _numbered("q", "")))


def _placeholders(word: str) -> tuple[bytes, ...]:
    """The placeholders of a word by position; None if the word has a meaning."""
    if _has_meaning(word.lower()):
        return ()
    if word.isupper():
        return () if word.lower().endswith(_ENDINGS[:-1]) else _UPPER
    first = "Q" if word[0].isupper() else "q"
    return _PLACEHOLDERS[first, next(filter(word.endswith, _ENDINGS))]


class Wording(NamedTuple):
    """The wording of a line.

    Attributes:
        line: The line with placeholders.
        words: The replaced words, in order.
    """

    line: bytes
    words: list[bytes]

    def name(self, name: str) -> str:
        """Returns a name of the wording in the words of the line."""
        return _HOLDER.sub(self._word, name) if "q" in name or "Q" in name else name

    def _word(self, holder: re.Match[str]) -> str:
        return self.words[_INDEX[holder[0][1:3].lower()]].decode()

    def span(self, span: Span) -> Span:
        """Returns the span in the line that corresponds to a span of digits in the wording."""
        begin, end = span
        holders = _HOLDER_BYTES.findall(self.line, 0, begin)
        shift = len(b"".join(self.words[: len(holders)])) - len(b"".join(holders))
        return begin + shift, end + shift


class Wordings:
    """Finds the wordings of lines."""

    def __init__(self) -> None:
        self._placeholders: dict[bytes, tuple[bytes, ...]] = {}

    def of(self, line: bytes) -> Wording:
        """Returns the wording of a line."""
        known, parts, words = self._placeholders, _WORD.split(line), []
        for i in range(1, len(parts), 2):
            word = parts[i]
            placeholders = known.get(word)
            if placeholders is None:
                placeholders = self._add(word)
            if placeholders and len(words) < len(_NUMBERS):
                parts[i] = placeholders[len(words)]
                words.append(word)
        return Wording(b"".join(parts), words)

    def _add(self, word: bytes) -> tuple[bytes, ...]:
        if len(self._placeholders) >= KEPT:
            self._placeholders.clear()
        self._placeholders[word] = placeholders = _placeholders(word.decode())
        return placeholders
