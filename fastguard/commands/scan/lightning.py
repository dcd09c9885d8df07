"""Parses the progress bars of Lightning, drawn by tqdm or rich.

Epoch 3:  37%|███▋      | 15/41 [00:01<00:02, 12.30it/s, v_num=0, train_loss=nan.0]
Epoch 3/9 ━━━━━━━━━━━━━━━ 15/41 0:00:01 • 0:00:02 12.30it/s train_loss: nan

Epochs count from 0, as printed.
"""

from __future__ import annotations

import re

from fastguard.commands.scan.reading import INT, Reading, Where, span_of
from fastguard.commands.scan.values import nonfinite_values

NAME = "lightning"

_BAR = re.compile(
    rf"\s*Epoch ({INT})(?:/({INT}))?:?\s{{1,9}}"
    rf"(?:(?:\d{{1,3}}%)?\|[^|]*\|\s*|[━╸╺╶╴─ ]+)({INT})/(?:({INT})|\?)\s"
)
_METRIC = re.compile(r"[=:]\s*[+-]?(?:\d|nan|inf)", re.IGNORECASE)


class Lightning:
    """Parses training bars; validation bars do not give the epoch."""

    def read(self, text: str) -> Reading | None:
        """Parses a line; None if it is not of this dialect."""
        bar = _BAR.match(text)
        if bar is None:
            return None
        rest = text[bar.end() :]
        where = Where(*(span_of(bar, group) for group in (1, 2, 3, 4)))
        metrics = rest.partition("it/s")[2]
        measured = _METRIC.search(metrics) is not None
        return Reading(NAME, where.place(text), nonfinite_values(rest)[0], measured, where)
