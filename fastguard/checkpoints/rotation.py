"""Which checkpoints stay when a new one has come, and which one is the best."""

from __future__ import annotations

from collections.abc import Sequence

from fastguard.checkpoints.entry import Entry


def best(entries: Sequence[Entry], mode: str) -> Entry | None:
    """The clean checkpoint with the best metric, the newest of several; None if none has one.

    Args:
        entries: Oldest first.
        mode: `"min"` or `"max"`.
    """
    found: Entry | None = None
    for entry in entries:
        if entry.metric is None or not entry.clean or entry.metric != entry.metric:  # NaN: never
            continue
        if (
            found is None
            or found.metric is None
            or (entry.metric <= found.metric if mode == "min" else entry.metric >= found.metric)
        ):
            found = entry
    return found


def kept(entries: Sequence[Entry], keep: int, keep_clean: int, mode: str) -> tuple[Entry, ...]:
    """The entries that stay: the newest, the newest clean ones, the best.

    The bootstrap checkpoint of a run needs no rule of its own: it is clean, so it stays until
    `keep_clean` later ones are.
    """
    clean = [entry for entry in entries if entry.clean]
    staying = {entry.serial for entry in [*entries[-keep:], *clean[-keep_clean:]]}
    champion = best(entries, mode)
    if champion is not None:
        staying.add(champion.serial)
    return tuple(entry for entry in entries if entry.serial in staying)
