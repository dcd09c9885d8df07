"""Structured data between lines of text: tables that a program prints, and indented JSON objects.

  epoch   loss     | step | loss |     {
      1    0.5     |------|------|       "loss": NaN,
      2    nan     |    2 |  nan |       "step": 2
                                       }

A table or an object is found by a line with NaN or Inf, and the header or brace before that line.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from fastguard.commands.scan.columns import is_place
from fastguard.commands.scan.lines import text_of
from fastguard.commands.scan.names import PLACES
from fastguard.commands.scan.vocabulary import is_metric, is_undefined

WALKED = 1 << 16
"""Number of bytes above a row that are searched for its header."""

MAX_COLUMNS = 64

LONGEST, TRIED = 1 << 14, 16
"""Maximum size of an object in bytes, and maximum number of braces tried as its beginning."""

_BAR = re.compile(r"[|│┃║]")
_NUMBER = r"[+-]?(?:\d[\d.,:]*(?:e[+-]?\d+)?[%sKMG]?|\.\d+|nan|inf(?:inity)?|-+|n/?a)"
_ROW = re.compile(rf"\s*{_NUMBER}(?:\s+{_NUMBER})+\s*", re.IGNORECASE)
_RULE = re.compile(r"[\s|:+=─━═┼╇╪┿╋├┤┡┩┌┐└┘╒╕╞╡╘╛┏┓┳┬┴┢╈╀╢╟-]+")
_NAME = re.compile(r"[^\W\d][\w./@%()\[\]-]{0,79}(?: [\w./@%()\[\]-]{1,40}){0,3}")
MLFLOW = re.compile(r"\d{13} [+-]?(?:\d\S*|nan|inf(?:inity)?) \d{1,15}\s*", re.IGNORECASE)
_CANDIDATE = re.compile(rb"\s*+(?:\||\xe2\x94|[0-9])|\s++\"\w")
_OF_NUMBERS = b"0123456789 \t.,:+-%eEnNaAiIfFtTyY/sKMG|*;"
_OPENING = re.compile(rb"\{(?=[ \t\r]*\n[ \t]+\")")
_WIDE = re.compile(r"\s{2,}|\t")
_SHAPE = bytes.maketrans(b"123456789", b"000000000")
_DECODER = json.JSONDecoder()


class Header(NamedTuple):
    """The header of a printed table.

    Attributes:
        names: The names of the columns.
        delimiter: What separates the cells.
    """

    names: list[str]
    delimiter: str


SPACES, BARS = " ", "||"
"""Delimiters for cells separated by spaces, and for cells with bars of any kind around them."""

OF_CLASSES = ("class", "classes", "category", "label", "task", "tasks")
"""First columns of tables of evaluations, which have NaN for classes without samples."""

OF_MLFLOW = Header(["timestamp", "value", "step"], SPACES)
"""Files that MLflow writes, one per metric, without a header."""


def may_be_inset(line: bytes) -> bool:
    """Fast check whether a line may be a row or a key of an indented object."""
    found = _CANDIDATE.match(line)
    if found is None or not found[0][-1:].isdigit():
        return found is not None
    return not line.translate(None, _OF_NUMBERS)


def cells_of(text: str, delimiter: str) -> list[str]:
    """The cells of a row of a printed table; empty if the text is not a row."""
    if delimiter == SPACES:
        return text.split() if _ROW.fullmatch(text) else []
    if _RULE.fullmatch(text):
        return []
    parts = _BAR.split(text.strip()) if delimiter == BARS else text.split(delimiter)
    cells = [cell.strip(" *`\t\r") for cell in parts]
    return cells[not cells[0] : len(cells) - (not cells[-1])] if delimiter == BARS else cells


def header_of(lines: bytes, at: int, end: int, stop: int) -> Header | None:
    """The header of the table with a row at an offset, or None.

    Args:
        lines: Lines of text.
        at, end: Offsets of the row.
        stop: Offset from which lines are known to contain no header.
    """
    text = text_of(lines[at:end])
    if MLFLOW.fullmatch(text):
        return OF_MLFLOW
    delimiter = BARS if _BAR.search(text) else next(filter(text.__contains__, ";,"), SPACES)
    n = len(cells_of(text, delimiter))
    if not 1 < n <= MAX_COLUMNS:
        return None
    shape = lines[at:end].translate(_SHAPE)
    for line in reversed(lines[max(stop, at - WALKED) : at].split(b"\n")[:-1]):
        if line.translate(_SHAPE) == shape:
            continue
        text = text_of(line)
        names = _names(text, delimiter)
        if len(names) == n - 1 and delimiter == SPACES:
            names = ["", *names]  # the index column of pandas
        if len(names) == n and _are_names(names):
            return Header(names, delimiter)
        if not _RULE.fullmatch(text) and len(cells_of(text, delimiter)) != n:
            break
    return None


def _names(text: str, delimiter: str) -> list[str]:
    if delimiter != SPACES:
        return cells_of(text, delimiter)
    wide = _WIDE.split(text.strip())
    return wide if len(wide) > 1 and any(" " in name for name in wide) else text.split()


def _are_names(names: list[str]) -> bool:
    """Whether these are names of columns: one names a place, or two name metrics."""
    if not all(_NAME.fullmatch(name) for name in names if name):
        return False
    if any(name.lower() in PLACES and not is_place(name) for name in names):
        return False  # the line is a sentence
    if any(map(is_undefined, names)) or names[0].lower() in OF_CLASSES:
        return True
    return any(map(is_place, names)) or sum(map(is_metric, names)) > 1


def object_around(lines: bytes, at: int) -> tuple[dict[str, Any], int] | None:
    """The outermost indented JSON object around an offset, and the offset of its end; or None."""
    key = lines.find(b'"', at) + 1
    first = max(at - LONGEST, lines.rfind(b"\n}", max(0, at - LONGEST), at), 0)
    begins = [brace.start() for brace in _OPENING.finditer(lines, first, key)]
    for begin in begins[-TRIED:]:
        text = text_of(lines[begin : begin + LONGEST])
        try:
            found, length = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            continue
        end = begin + len(text[:length].encode())
        if end > at:
            return found, end
    return None
