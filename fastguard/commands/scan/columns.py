"""Classifies the names of columns and keys: places in the run, losses and gradient norms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.vocabulary import words_of

_EPOCH = re.compile(r"(?:.{0,40}[/_.])?epochs?|ep", re.IGNORECASE)
_STEP = re.compile(
    r"(?:.{0,40}/)?_?(?:(?:global|train|training|opt|optimizer)_)?(?:step|steps|iter|iters|iteration"
    r"|iterations|update|updates|num_updates)|step_num|it",
    re.IGNORECASE,
)
_BATCH = re.compile(r"(?:mini)?batch(?:_?(?:idx|index|id|number))?", re.IGNORECASE)
KINDS = (_EPOCH, _BATCH, _STEP)
"""Patterns for the names of a place."""

NAMED_BY = ("key", "metric", "name", "tag", "variable", "metric_name")
"""Columns with the name of a metric, whose value is in the column `value`."""

_RIVALS = frozenset(
    "critic value vf q qf d g disc discriminator gen generator adv adversarial kl aux".split()
)
# such as 1.20e+02, as numpy prints integers
_INTEGER = re.compile(r"\d{1,15}(?:\.0{0,9})?|\d\.\d{1,20}e\+?0\d")
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{0,20})?")


def is_place(name: str) -> bool:
    """Whether a column gives the place in the run."""
    return kind_of(name) is not None


@lru_cache(1024)
def kind_of(name: str) -> re.Pattern[str] | None:
    """The pattern in `KINDS` that matches a name, or None."""
    name = name.strip().replace(" ", "_")
    return next((pattern for pattern in (_EPOCH, _STEP, _BATCH) if pattern.fullmatch(name)), None)


def place_of(cells: Iterable[tuple[str, str]]) -> Place:
    """The place given by a row's cells, `(name, text)` each."""
    epoch = batch = step = None
    for name, cell in cells:
        kind = kind_of(name)
        short = cell.isdecimal() and len(cell) <= 15
        if kind is _EPOCH and epoch is None and (short or _NUMBER.fullmatch(cell)):
            epoch = int(cell) if short else whole(float(cell))
        elif kind is _STEP and step is None and (short or _INTEGER.fullmatch(cell)):
            step = int(float(cell))
        elif kind is _BATCH and batch is None and (short or _INTEGER.fullmatch(cell)):
            batch = int(float(cell))
    return Place(epoch, None, batch, None, step)


def whole(number: float) -> float:
    """Converts a number to an integer if it is one."""
    return int(number) if number == int(number) else number


def is_loss(name: str) -> bool:
    """Whether a series is a loss, which should fall.

    Example:
        >>> is_loss("train/loss"), is_loss("val_loss_epoch"), is_loss("loss_scale")
        (True, True, False)
    """
    words = words_of(name)
    if name.endswith(("__MIN", "__MAX")):  # W&B exports minima and maxima beside the series itself
        return False
    if not {"scale", "scaler", "best", "weight", "time", "ratio"}.isdisjoint(words):
        return False
    return any(word.endswith("loss") or word in ("cost", "nll", "objective") for word in words)


def is_rival(name: str) -> bool:
    """Whether a loss may rise in a healthy run: of a critic, or of two networks that compete."""
    return not _RIVALS.isdisjoint(words_of(name))


def is_grad_norm(name: str) -> bool:
    """Whether a series is a gradient norm."""
    words = words_of(name)
    if "gnorm" in words:
        return True
    return "norm" in words and not {"grad", "grads", "gradient", "global", "total"}.isdisjoint(
        words
    )
