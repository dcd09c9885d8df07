"""Parses the progress lines of Ultralytics and YOLOv5.

      Epoch    GPU_mem   box_loss   cls_loss   dfl_loss  Instances       Size
      3/100      2.1G        nan      2.346     0.9877         34        640: 37% ━━━━──────── 15/41

The losses are running means over an epoch, so a NaN persists until the epoch ends. The batch number
is taken from the bar, which may be one batch behind the losses.
"""

from __future__ import annotations

import re

from fastguard.commands.scan.reading import INT, NOWHERE, Reading, Where, span_of
from fastguard.commands.scan.spellings import canonical
from fastguard.commands.scan.values import Value, has_nonfinite

NAME = "ultralytics"

_HEAD = re.compile(r"\s*Epoch\s+(?:GPU_mem|gpu_mem)\s+(\S.*)")
_ROW = re.compile(rf"\s*({INT})/({INT})\s+[\d.]+[KMGT]?B?\s+(\S.*?):\s+\d+%")
_BAR = re.compile(rf"\D*?({INT})/({INT})")


class Ultralytics:
    """Parses rows under the names of the last header."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def read(self, text: str) -> Reading | None:
        """Parses a line; None if it is not of this dialect."""
        row = _ROW.match(text)
        if row is None:
            head = _HEAD.match(text)
            if head is None:
                return None
            self._names = head[1].split()
            return Reading(NAME, NOWHERE, measured=False)
        columns = row[3].split()
        bar = _BAR.match(text, row.end())
        where = Where(row.span(1), row.span(2), span_of(bar, 1), span_of(bar, 2))
        names = self._names if len(self._names) == len(columns) else [""] * len(columns)
        bad = [Value(n, canonical(c)) for n, c in zip(names, columns, strict=True) if _is_bad(c)]
        return Reading(NAME, where.place(text), tuple(bad), True, where)


def _is_bad(column: str) -> bool:
    return not column[-1].isdigit() and has_nonfinite(column)
