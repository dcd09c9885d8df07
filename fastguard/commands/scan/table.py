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
import re

from fastguard.commands.scan.reading import Place, Reading
from fastguard.commands.scan.values import Value, canonical, has_nonfinite, is_bound, is_metric

NAME = "table"

_DELIMITERS = "\t,;"
_HEAD = re.compile(
    r"(?!.*[\s:=][+-]?\.?\d[\d.e+-]*$)"  # "loss 0.5" is no name
    r"[^\W\d][\w./@%()\[\]:,|+*#&^~ -]{0,79}"
)
_NO_CELL = re.compile(r"[\s:=]")
_EPOCH = re.compile(r"(?:.{0,40}[/_.])?epochs?|ep", re.IGNORECASE)
_STEP = re.compile(
    r"(?:.{0,40}/)?_?(?:(?:global|train|training|opt|optimizer)_)?(?:step|steps|iter|iters|iteration"
    r"|iterations|update|updates|num_updates)",
    re.IGNORECASE,
)
_BATCH = re.compile(r"(?:mini)?batch(?:_?(?:idx|index|id|number))?", re.IGNORECASE)
_INTEGER = re.compile(r"\d{1,15}(?:\.0{0,9})?")
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{0,20})?")


class Table:
    """Reads rows under the names of the head."""

    def __init__(self) -> None:
        self._begun = False
        self._delimiter = ""
        self._names: list[str] = []
        self._bad: set[int] = set()  # columns that were bad and have not been good since

    def read(self, text: str) -> Reading | None:
        """What a line says, or None if it is not of a table."""
        if self._begun and not self._names:
            return None
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
                return Reading(NAME, Place(), measured=False)
        return None

    def _row(self, cells: list[str]) -> Reading | None:
        bad, found, again_good = [], set(), False
        for i, (name, cell) in enumerate(zip(self._names, cells, strict=True)):
            if not cell or _is_place(name):
                continue
            if cell[-1].isdigit():
                again_good |= i in self._bad
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
        return Reading(NAME, self._place(cells), tuple(bad), bool(bad) or again_good)

    def _place(self, cells: list[str]) -> Place:
        epoch = batch = step = None
        for name, cell in zip(self._names, cells, strict=True):
            if epoch is None and _EPOCH.fullmatch(name) and _NUMBER.fullmatch(cell):
                epoch = float(cell)
            elif step is None and _STEP.fullmatch(name) and _INTEGER.fullmatch(cell):
                step = int(float(cell))
            elif batch is None and _BATCH.fullmatch(name) and _INTEGER.fullmatch(cell):
                batch = int(float(cell))
        if epoch is not None and epoch.is_integer():
            epoch = int(epoch)
        return Place(epoch=epoch, batch=batch, step=step)


def _cells(text: str, delimiter: str) -> list[str]:
    if delimiter not in text:
        return []
    if '"' in text:
        return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter), [])]
    return [cell.strip() for cell in text.split(delimiter)]


def _is_place(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_EPOCH, _STEP, _BATCH))


def _is_known(name: str) -> bool:
    return _is_place(name) or is_metric(name)
