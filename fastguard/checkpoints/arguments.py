"""Validates and normalizes arguments passed to the store."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from fastguard.checkpoints.entry import Entry
from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.records.step_record import StepRecord

NOTES = 8
"""Number of incidents whose text the manifest keeps. Other incidents are only counted."""


def joined(objects: Mapping[str, Any] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Merges objects given by mapping and by keyword into one dict."""
    if objects is not None and not isinstance(objects, Mapping):
        raise TypeError(
            f"objects is a {type(objects).__name__}; give names: save(model=model, step=step)"
        )
    twice = set(objects or ()) & set(named)
    if twice:
        names = ", ".join(sorted(twice))
        raise ValueError(
            f"objects and the keyword arguments both contain {names}; pass each only once"
        )
    return {**(objects or {}), **named}


def integer(name: str, value: object, low: int) -> int:
    """Converts an integer >= `low` to int; accepts numpy and tensor integers.

    Raises:
        ValueError: The value is not such an integer.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    return count_of(name, value if number is None else number, low)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={shown(value)} is unknown; use one of {known}")


def counted(
    last: Entry | None, given: int | Iterable[StepRecord | str] | None, skipped: int | None
) -> tuple[int, tuple[str, ...]]:
    """Returns the number of incidents since the last clean checkpoint, and the latest incidents.

    Args:
        last: The entry of the previous checkpoint, clean or not; None if this is the first one.
        given: The `incidents` argument of `CheckpointStore.save`.
        skipped: Number of skipped steps of the run; None: unknown.
    """
    carried = 0 if last is None or last.clean else last.incidents
    notes = () if last is None or last.clean else last.notes
    if given is None:
        if skipped is None:
            return carried, notes
        before = (last.skipped_steps or 0) if last is not None else 0
        return carried + (skipped - before if skipped >= before else skipped), notes
    if isinstance(given, int):
        return carried + integer("incidents", given, 0), notes
    lines = [str(item) for item in given if not isinstance(item, StepRecord) or item.is_incident]
    return carried + len(lines), (*notes, *lines)[-NOTES:]
