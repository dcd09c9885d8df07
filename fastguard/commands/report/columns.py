"""Records as columns: what the report draws, as float64 arrays, and the bad steps among them.

A Python loop over a million records costs more than parsing them. Here each field of a block is
gathered by one list comprehension and converted by numpy in one call, about 1 µs a record in all;
only bad steps are looked at one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastguard.errors import MOST_OF_A_NAME, NAMED_CULPRITS, Culprit
from fastguard.errors.plain_text import printable
from fastguard.records.step_record import LOSS_SCALE
from fastguard.records.strict_json import shortened

MOST_NAMES = 32
"""Losses, and thresholds, that are drawn by name; what a run has beyond them is counted."""

OTHERS = "others"
"""The action, or the reason, of records with yet another one when there are `MOST_NAMES`."""

# KeyError: a slice of a dict, since Python 3.12.
_UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
_MOST_OF_A_TAG = 1000


class Series(NamedTuple):
    """What is drawn as a line: `kind` is `"norm"`, `"limit"`, `"coef"`, `"lr"`, `"loss"` or
    `"threshold"`; the last two have a name."""

    kind: str
    name: str = ""


NORM, COEF, LR, LIMIT = Series("norm"), Series("coef"), Series("lr"), Series("limit")
_FIELDS = {NORM: "total_norm", COEF: "clip_coef", LR: "lr", LIMIT: "limit"}
_MAPPINGS = {"loss": "losses", "threshold": "thresholds"}


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that was not simply applied or clipped. All text is printable and of bounded length.

    Attributes:
        row: Its place in the block.
        step: Its number.
        reason: As in `StepRecord`; where the record has none (gradients that were cleaned, NaN that
            was let through), what was non-finite.
        action: As in `StepRecord`.
        culprits: As in `StepRecord`.
        n_culprits: How many bad parameters there were.
        bad_losses: The names of the non-finite losses.
        n_losses: How many losses there were.
        spikes: The signals that spiked.
        norm: The total norm.
        tag: As in `StepRecord`, shortened.
        culprit_ranks: As in `StepRecord`; 0 if the record is of one process.
        culprit_rank: As in `StepRecord`.
    """

    row: int = field(compare=False)
    step: int
    reason: str
    action: str
    culprits: tuple[Culprit, ...]
    n_culprits: int
    bad_losses: tuple[str, ...]
    n_losses: int
    spikes: tuple[str, ...]
    norm: float
    tag: Any
    culprit_ranks: int = 0
    culprit_rank: int | None = None

    @property
    def is_incident(self) -> bool:
        """As in `StepRecord`: whether more happened than that a loss scale was lowered."""
        return self.reason != LOSS_SCALE


@dataclass(frozen=True, slots=True)
class Columns:
    """A block of records.

    Attributes:
        step: int64 `(n,)`.
        values: float64 `(n,)` by series; NaN where a record has no value.
        bad: The bad steps, in order.
        actions: How many records had each action.
        rejected: How many records were left out because a field was not of its type.
    """

    step: np.ndarray
    values: dict[Series, np.ndarray]
    bad: list[BadStep]
    actions: Counter[str]
    rejected: int


class ColumnReader:
    """Turns blocks of records into `Columns`, with the same series from block to block.

    Attributes:
        names: The names seen so far by kind, `MOST_NAMES` at most.
        unnamed: Whether there were more.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {kind: [] for kind in _MAPPINGS}
        self.unnamed = False
        self._words: dict[str, dict[str, str]] = {"action": {}, "reason": {}}

    def read(self, records: list[dict[str, Any]]) -> Columns:
        """The columns of some records that have an integer `"step"`."""
        try:
            return self._columns(records, 0)
        except _UNREADABLE:
            readable = self._readable(records)
            return self._columns(readable, len(records) - len(readable))

    def _readable(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that can be read, found by halving: a few bad ones in a block stay cheap."""
        try:
            self._columns(records, 0)
            return records
        except _UNREADABLE:
            half = len(records) // 2
            return self._readable(records[:half]) + self._readable(records[half:]) if half else []

    def _columns(self, records: list[dict[str, Any]], rejected: int) -> Columns:
        values = {
            series: _floats([record.get(key) for record in records])
            for series, key in _FIELDS.items()
        }
        suspects = {
            i
            for i, record in enumerate(records)
            if record.get("reason") is not None or record.get("n_culprits")
        }
        suspects.update(_nonfinite(values[NORM], [r.get("total_norm") for r in records]))
        for i in suspects:
            if any(records[i].get(key) for key in ("nan", "posinf", "neginf")):
                values[NORM][i] = math.nan  # that of the finite elements alone would be a dip
        names: dict[str, list[str]] = {}
        for kind, key in _MAPPINGS.items():
            mappings = [record.get(key) or {} for record in records]
            if set(map(type, mappings)) - {dict}:
                raise ValueError(f"{key} is no object")
            names[kind] = self._names_of(kind, mappings)
            for name in names[kind]:
                found = [mapping.get(name) for mapping in mappings]
                values[Series(kind, name)] = column = _floats(found)
                if kind == "loss":
                    suspects.update(_nonfinite(column, found))
        steps = np.array([record["step"] for record in records], dtype=np.int64)
        actions: Counter[str] = Counter()
        for action, n in Counter(record.get("action", "applied") for record in records).items():
            actions[self._word("action", action)] += n
        bad = [self._bad_step(i, records[i]) for i in sorted(suspects)]
        self.names = names  # not of records that are left out
        return Columns(steps, values, bad, actions, rejected)

    def _names_of(self, kind: str, mappings: Iterable[Mapping[str, Any]]) -> list[str]:
        known = self.names[kind]
        new = sorted(set(chain.from_iterable(mappings)).difference(known))
        room = MOST_NAMES - len(known)
        self.unnamed = self.unnamed or len(new) > room
        return [*known, *new[:room]]

    def _word(self, kind: str, word: Any) -> str:
        """An action or a reason, to be printed and to be counted by: there is an end of them."""
        words = self._words[kind]
        if word in words:
            return words[word]
        if not isinstance(word, str):
            raise ValueError(f"{kind} is {word!r}, not a name")
        if len(words) == MOST_NAMES:
            return OTHERS
        words[word] = printable(word, MOST_OF_A_NAME)
        return words[word]

    def _bad_step(self, row: int, record: dict[str, Any]) -> BadStep:
        losses = {k: float(v) for k, v in (record.get("losses") or {}).items() if v is not None}
        bad_losses = [name for name, value in losses.items() if not math.isfinite(value)]
        culprits = tuple(
            (_name(name), int(nan), int(posinf), int(neginf))
            for name, nan, posinf, neginf in (record.get("culprits") or ())[:NAMED_CULPRITS]
        )
        n_culprits = int(record.get("n_culprits") or len(culprits))
        reason = record.get("reason")
        if reason is None:
            reason = "nonfinite_loss" if bad_losses and not n_culprits else "nonfinite_grad"
        norm, rank = record.get("total_norm"), record.get("culprit_rank")
        return BadStep(
            row=row,
            step=record["step"],
            reason=self._word("reason", reason),
            action=self._word("action", record.get("action", "applied")),
            culprits=culprits,
            n_culprits=n_culprits,
            bad_losses=tuple(map(_name, bad_losses[:MOST_NAMES])),
            n_losses=len(losses),
            spikes=tuple(map(_name, (record.get("spikes") or ())[:MOST_NAMES])),
            norm=math.nan if norm is None else float(norm),
            tag=shortened(record.get("tag"), room=_MOST_OF_A_TAG),
            culprit_ranks=int(record.get("culprit_ranks") or 0),
            culprit_rank=None if rank is None else int(rank),
        )


def _name(name: Any) -> str:
    return printable(str(name), MOST_OF_A_NAME)


def _floats(values: list[Any]) -> np.ndarray:
    """None is NaN; the strings of strict JSON are the numbers that they name."""
    column = np.array(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError("a list where a number belongs")
    return column


def _nonfinite(column: np.ndarray, found: list[Any]) -> Iterator[int]:
    """The rows of NaN and infinities, without those that have no value at all."""
    return (i for i in np.flatnonzero(~np.isfinite(column)).tolist() if found[i] is not None)
