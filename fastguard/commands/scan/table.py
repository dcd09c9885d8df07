"""Tables with a head, as CSV or TSV: what Lightning's CSVLogger, Ultralytics and pandas write.

epoch,step,train_loss,val_loss
0,9,nan,
0,9,,0.5

The head is the first line of the file (# before it, as numpy writes, is none of it), or any later
one once there was a table. An empty cell was not measured then: a row without a value for the
columns that were bad is no sign that the run is finite again.
"""

from __future__ import annotations

import csv
import math
import re

from fastguard.commands.scan.columns import is_place, place_of
from fastguard.commands.scan.reading import NOWHERE, Reading
from fastguard.commands.scan.series import AllSeries
from fastguard.commands.scan.tokens import canonical
from fastguard.commands.scan.values import Value, has_nonfinite
from fastguard.commands.scan.words import is_bound, is_metric

NAME = "table"

_DELIMITERS = "\t,;"
_HEAD = re.compile(
    r"(?!.*[\s:=][+-]?\.?\d[\d.e+-]*$)"  # "loss 0.5" is no name
    r"[^\W\d][\w./@%()\[\]:,|+*#&^~ -]{0,79}"
)
_NO_CELL = re.compile(r"[\s:=]")
_NAMED_BY = ("key", "metric", "name", "tag", "variable", "metric_name")


class Table:
    """Reads rows under the names of the head.

    Args:
        series: Which names are judged as series.
    """

    def __init__(self, series: AllSeries) -> None:
        self._series = series
        self._begun = False
        self._delimiter = ""
        self._names: list[str] = []
        self._bad: set[int] = set()  # columns that were bad and have not been good since

    @property
    def waits(self) -> bool:
        """Whether the next line may be of a table."""
        return not self._begun or bool(self._names)

    def give_up(self) -> None:
        """The log is no table."""
        self._begun, self._names = True, []

    def read(self, text: str) -> Reading | None:
        """What a line says, or None if it is not of a table."""
        if self._begun and not self._names:
            return None
        if not self._bad and (reading := self._numbers(text)) is not None:
            return reading
        text = text.lstrip("\ufeff# ") if text.lstrip().startswith(("#", "\ufeff")) else text
        if not self._begun:
            self._begun = True
            return self._take_head(text)
        cells = _cells(text, self._delimiter)
        if not any(cell[-1:].isdigit() for cell in cells):
            if (head := self._take_head(text)) is not None:
                return head
        return self._row(cells) if len(cells) == len(self._names) else None

    def _take_head(self, text: str) -> Reading | None:
        for delimiter in _DELIMITERS:
            names = _cells(text, delimiter)
            named = names[1:] if names[:1] == [""] else names  # pandas names no column of numbers
            if (
                len(names) > 1
                and all(map(_HEAD.fullmatch, named))
                and any(map(_is_known, named))
                and not any(map(has_nonfinite, named))
            ):
                self._delimiter, self._names, self._bad = delimiter, names, set()
                self._places = [is_place(name) for name in names]
                self._judged = [self._series.judges(name) for name in names]
                self._places_at = [(i, n) for i, n in enumerate(names) if self._places[i]]
                self._judged_at = [(i, n) for i, n in enumerate(names) if self._judged[i]]
                lower = [name.lower() for name in names]
                self._named_by = next((i for i, n in enumerate(lower) if n in _NAMED_BY), None)
                self._value_at = lower.index("value") if "value" in lower else None
                self._plain = self._named_by is None or self._value_at is None
                return Reading(NAME, NOWHERE, measured=False)
        return None

    def _numbers(self, text: str) -> Reading | None:
        """What a row of finite numbers says, as most are; None: it must be read cell by cell."""
        if not self._delimiter or not text[:1].isdigit() or '"' in text or not self._plain:
            return None
        cells = text.split(self._delimiter)
        lower = text.lower()
        if len(cells) != len(self._names) or "n" in lower or "#" in text:
            return None
        numbers = {}
        for i, name in self._judged_at:
            try:
                value = float(cells[i]) if cells[i] else math.nan
            except ValueError:
                return None
            if math.isfinite(value):
                numbers[name] = value
        place = place_of([(name, cells[i].strip()) for i, name in self._places_at])
        return Reading(NAME, place, (), False, None, numbers)

    def _row(self, cells: list[str]) -> Reading | None:
        bad, found, again_good = [], set(), False
        numbers: dict[str, float] = {}
        names, judged = self._names, self._judged
        if self._named_by is not None and self._value_at is not None:  # key, value, step
            names, judged = names.copy(), judged.copy()
            names[self._value_at] = cells[self._named_by]
            judged[self._value_at] = self._series.judges(cells[self._named_by])
        for i, (name, cell) in enumerate(zip(names, cells, strict=True)):
            if not cell or self._places[i]:
                continue
            if cell[-1].isdigit():
                again_good |= i in self._bad
                if judged[i]:
                    try:
                        number = float(cell)
                    except ValueError:
                        continue
                    if math.isfinite(number):  # 1e999 is not
                        numbers[name] = number
            elif not has_nonfinite(cell):
                continue
            elif _NO_CELL.search(cell):  # a sentence with commas in it: plain text
                return None
            elif not is_bound(name, canonical(cell)):
                bad.append(Value(name, canonical(cell)))
                found.add(i)
        if bad:
            self._bad |= found
        elif again_good:
            self._bad.clear()
        place = place_of(
            (name, cell)
            for name, cell, place in zip(names, cells, self._places, strict=True)
            if place
        )
        return Reading(NAME, place, tuple(bad), bool(bad) or again_good, None, numbers)


def _cells(text: str, delimiter: str) -> list[str]:
    if delimiter not in text:
        return []
    if '"' in text:
        return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter), [])]
    return [cell.strip() for cell in text.split(delimiter)]


def _is_known(name: str) -> bool:
    return is_place(name) or is_metric(name) or name.lower() in ("value", *_NAMED_BY)
