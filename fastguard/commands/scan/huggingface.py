"""Parses dicts printed by the Trainer of Hugging Face, and similar dicts.

{'loss': nan, 'grad_norm': nan, 'learning_rate': 2.5e-05, 'epoch': 1.17}
{'loss': 'nan', 'grad_norm': 'nan', 'learning_rate': '2.5e-05', 'epoch': '1.167'}
 58%|█████▊    | 7/12 [00:00<00:00, 515.96it/s]

Transformers 5 prints the second form. A dict does not contain its step, so the step is taken from
the progress bar that follows.
"""

from __future__ import annotations

import re

from fastguard.commands.scan.places import names_settings
from fastguard.commands.scan.reading import INT, Reading, Where, span_of
from fastguard.commands.scan.values import nonfinite_values

NAME = "huggingface"

_EPOCH = re.compile(r"['\"]epoch['\"]:\s*['\"]?([0-9]{1,15}(?:\.[0-9]+)?)")
_STEP = re.compile(rf"['\"](?:global_)?(?:step|iter|iteration)['\"]:\s*['\"]?({INT})")
_BAR = re.compile(rf"\s*\d{{1,3}}%\|[^|]*\|\s*({INT})/{INT} \[[^,\]]*,[^,\]]*\]?\s*$")


class HuggingFace:
    """Parses dicts that name their epoch."""

    def read(self, text: str) -> Reading | None:
        """Parses a line; None if it is not of this dialect."""
        start = text.find("{")
        epoch = _EPOCH.search(text, start) if start >= 0 else None
        if epoch is None or names_settings(text):
            return None
        where = Where(epoch=epoch.span(1), step=span_of(_STEP.search(text, start), 1))
        return Reading(NAME, where.place(text), nonfinite_values(text[start:])[0], True, where)


def bare_bar(text: str) -> int | None:
    """The step of a bare progress bar, as the Trainer draws it."""
    bar = _BAR.match(text)
    return int(bar[1]) if bar else None
