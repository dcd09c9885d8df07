"""Converts records to columns: float64 arrays of everything the report draws, and the bad steps.

A Python loop over a million records takes longer than parsing them. Instead, one list comprehension
gathers each field of a block and numpy converts it in one call: about 1 µs per record in total.
Only bad steps are processed one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastguard.errors import MAX_NAME_LENGTH, NAMED_CULPRITS, Culprit
from fastguard.errors.plain_text import printable
from fastguard.records.step_record import LOSS_SCALE, replica_drifts
from fastguard.records.strict_json import shortened

MAX_NAMES = 32
"""Maximum number of losses and of thresholds drawn by name; further ones are only counted."""

OTHERS = "others"
"""Stands for any further action or reason once `MAX_NAMES` have been seen."""

# Since Python 3.12, slicing a dict raises a KeyError.
_UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
_MAX_TAG_LENGTH = 1000


class Series(NamedTuple):
    """Identifies one series. `kind` is `"norm"`, `"limit"`, `"coef"`, `"units"`, `"lr"`, `"time"`,
    `"loss"` or `"threshold"`; only the last two have a `name`. All but `"time"` are drawn."""

    kind: str
    name: str = ""


NORM, COEF, LR, LIMIT = Series("norm"), Series("coef"), Series("lr"), Series("limit")
UNITS = Series("units")  # the share of clipped units, if units have a limit
TIME = Series("time")
_FIELDS = {NORM: "total_norm", COEF: "clip_coef", LR: "lr", LIMIT: "limit", TIME: "time"}
_MAPPINGS = {"loss": "losses", "threshold": "thresholds"}


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that was not simply applied or clipped. All text is printable and bounded in length.

    Attributes:
        row: Index in the block.
        step: Step number.
        reason: As in `StepRecord`. If the record has no reason (gradients were cleaned, or NaN was
            propagated), says what was non-finite.
        action: As in `StepRecord`.
        culprits: As in `StepRecord`.
        n_culprits: Number of bad parameters.
        bad_losses: The names of the non-finite losses.
        n_losses: Number of losses.
        spikes: The signals that spiked.
        norm: The total norm.
        tag: As in `StepRecord`, shortened.
        culprit_ranks: As in `StepRecord`; 0 if the record is from a single process.
        culprit_rank: As in `StepRecord`.
        drifts: Phrases that say which replicas differ.
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
    drifts: tuple[str, ...] = ()

    @property
    def is_incident(self) -> bool:
        """As in `StepRecord`: False if the step only lowered a loss scale."""
        return self.reason != LOSS_SCALE


@dataclass(frozen=True, slots=True)
class Columns:
    """A block of records.

    Attributes:
        step: int64 `(n,)`.
        values: float64 `(n,)` by series; NaN where a record has no value.
        bad: The bad steps, in order.
        actions: Number of records per action.
        rejected: Number of records left out because a field has the wrong type.
        watched: Step number and `watch` of the records that have one.
    """

    step: np.ndarray
    values: dict[Series, np.ndarray]
    bad: list[BadStep]
    actions: Counter[str]
    rejected: int
    watched: list[tuple[int, dict[str, Any]]]


class ColumnReader:
    """Converts blocks of records to `Columns`, with consistent series across blocks.

    Attributes:
        names: The names seen so far per kind, at most `MAX_NAMES`.
        unnamed: Whether there were more names.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {kind: [] for kind in _MAPPINGS}
        self.unnamed: bool = False
        self._words: dict[str, dict[str, str]] = {"action": {}, "reason": {}}

    def read(self, records: list[dict[str, Any]]) -> Columns:
        """Converts records that have an integer `"step"`."""
        try:
            return self._columns(records, 0)
        except _UNREADABLE:
            readable = self._readable(records)
            return self._columns(readable, len(records) - len(readable))

    def _readable(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the readable records; fast by bisection if only a few are bad."""
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
            if record.get("reason") is not None
            or record.get("n_culprits")
            or record.get("nan")
            or record.get("posinf")
            or record.get("neginf")
        }
        suspects.update(_nonfinite(values[NORM], [r.get("total_norm") for r in records]))
        for i in suspects:
            if any(records[i].get(key) for key in ("nan", "posinf", "neginf")):
                # NaN, since the norm of the finite elements would show as a dip
                values[NORM][i] = math.nan
        if any(limited := [record.get("limited_units") or 0 for record in records]):
            clipped = _floats([record.get("clipped_units") for record in records])
            limited = _floats(limited)
            values[UNITS] = np.divide(
                clipped, limited, out=np.full(len(clipped), math.nan), where=limited > 0
            )
        names: dict[str, list[str]] = {}
        for kind, key in _MAPPINGS.items():
            mappings = [record.get(key) or {} for record in records]
            if set(map(type, mappings)) - {dict}:
                raise ValueError(f"{key} is not an object")
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
        self.names = names  # drops names that come from rejected records
        watched = [(r["step"], r["watch"]) for r in records if r.get("watch")]
        return Columns(steps, values, bad, actions, rejected, watched)

    def _names_of(self, kind: str, mappings: Iterable[Mapping[str, Any]]) -> list[str]:
        known = self.names[kind]
        new = sorted(set(chain.from_iterable(mappings)).difference(known))
        room = MAX_NAMES - len(known)
        self.unnamed = self.unnamed or len(new) > room
        return [*known, *new[:room]]

    def _word(self, kind: str, word: Any) -> str:
        """Returns an action or reason in printable form; limits the number of distinct ones."""
        words = self._words[kind]
        if word in words:
            return words[word]
        if not isinstance(word, str):
            raise ValueError(f"{kind} is {word!r}, not a name")
        if len(words) == MAX_NAMES:
            return OTHERS
        words[word] = printable(word, MAX_NAME_LENGTH)
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
            bad_losses=tuple(map(_name, bad_losses[:MAX_NAMES])),
            n_losses=len(losses),
            spikes=tuple(map(_name, (record.get("spikes") or ())[:MAX_NAMES])),
            norm=math.nan if norm is None else float(norm),
            tag=shortened(record.get("tag"), room=_MAX_TAG_LENGTH),
            culprit_ranks=int(record.get("culprit_ranks") or 0),
            culprit_rank=None if rank is None else int(rank),
            drifts=tuple(map(_name, replica_drifts(record.get("watch"))[:MAX_NAMES])),
        )


def _name(name: Any) -> str:
    return printable(str(name), MAX_NAME_LENGTH)


def _floats(values: list[Any]) -> np.ndarray:
    """Converts to float64: None becomes NaN, and the strings of strict JSON become numbers."""
    column = np.array(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError("expected a number, got a list")
    return column


def _nonfinite(column: np.ndarray, found: list[Any]) -> Iterator[int]:
    """Yields the rows with NaN or Inf, except rows that have no value at all."""
    return (i for i in np.flatnonzero(~np.isfinite(column)).tolist() if found[i] is not None)
