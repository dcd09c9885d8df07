"""Decides which checkpoints to keep after a new one, and which one is best."""

from __future__ import annotations

from collections.abc import Sequence

from fastguard.checkpoints.entry import Entry


def best(entries: Sequence[Entry], mode: str) -> Entry | None:
    """Returns the clean checkpoint with the best metric, the newest on a tie, or None.

    Args:
        entries: Oldest first.
        mode: `"min"` or `"max"`.
    """
    found: Entry | None = None
    for entry in entries:
        if entry.metric is None or not entry.clean or entry.metric != entry.metric:  # excludes NaN
            continue
        if (
            found is None
            or found.metric is None
            or (entry.metric <= found.metric if mode == "min" else entry.metric >= found.metric)
        ):
            found = entry
    return found


def kept(entries: Sequence[Entry], keep: int, keep_clean: int, mode: str) -> tuple[Entry, ...]:
    """Returns the entries to keep: the newest, the newest clean ones, and the best.

    A checkpoint saved before the first step needs no special rule. Because it is clean, it is kept
    until there are `keep_clean` later clean checkpoints.
    """
    clean = [entry for entry in entries if entry.clean]
    staying = {entry.serial for entry in [*entries[-keep:], *clean[-keep_clean:]]}
    champion = best(entries, mode)
    if champion is not None:
        staying.add(champion.serial)
    return tuple(entry for entry in entries if entry.serial in staying)
