"""Counts occasional events by name, along the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator


class Tally:
    """Counts events per name and bucket, with the step of the first event.

    Args:
        limit: Maximum number of buckets per name.
        names: Maximum number of names; events of further names are counted under `OTHERS`.
    """

    OTHERS = "all others"

    def __init__(self, limit: int, names: int = 64) -> None:
        self.limit = limit
        self.shift: int = 0
        self._names = names
        self._counts: dict[str, dict[int, tuple[int, int]]] = {}

    def add(self, name: str, step: int) -> None:
        """Counts one event at a step."""
        if name not in self._counts and len(self._counts) >= self._names:
            name = self.OTHERS
        counts = self._counts.setdefault(name, {})
        count, first = counts.get(step >> self.shift, (0, step))
        counts[step >> self.shift] = (count + 1, min(first, step))
        while len(counts) > self.limit:
            self._halve()
            counts = self._counts[name]

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were first counted."""
        return list(self._counts)

    def total(self, name: str) -> int:
        """The number of events in the whole run."""
        return sum(count for count, _ in self._counts[name].values())

    def items(self, name: str) -> Iterator[tuple[int, int, int]]:
        """Yields `(bucket, count, first step)` of each bucket with an event, in order."""
        for key in sorted(self._counts[name]):
            yield key, *self._counts[name][key]

    def _halve(self) -> None:
        self.shift += 1
        for name, counts in self._counts.items():
            joined: dict[int, tuple[int, int]] = {}
            for key, (count, first) in counts.items():
                before, earliest = joined.get(key >> 1, (0, first))
                joined[key >> 1] = (before + count, min(earliest, first))
            self._counts[name] = joined
