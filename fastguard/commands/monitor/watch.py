"""`Watch`: what is known of a run, from its latest records."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from fastguard.errors import NAMED_CULPRITS
from fastguard.records.read_json_lines import parse_record
from fastguard.records.step_record import StepRecord
from fastguard.records.strict_json import shortened

CURVE = 4096
"""Records kept for the curves."""

INCIDENTS = 100
"""Incidents kept to be listed; the others are counted."""

INCIDENT = b'"reason": "'
"""What the line of an incident holds, as `JsonLinesSink` writes it; in others it is null."""

MOST_NAMES = 64
"""Losses, thresholds and spikes of a record that are kept."""

MOST_OF_A_NAME, MOST_OF_A_TAG = 200, 2000
"""Characters of a name, and of a tag, that are kept."""

RATE_SECONDS = 30.0
"""The rate is that of the last so many seconds."""


class Watch:
    """Takes lines of records, oldest first; memory depends on `last` alone, not on the records.

    Args:
        last: How many records the counts and the verdict are about.

    Attributes:
        latest: The last record, or None.
        curve: The last records, up to `CURVE` of the `last`.
        incidents: The last incidents, oldest first; also from before the `last` records.
        n_records: How many records came in all.
        n_incidents: How many of those were incidents.
        damaged: How many lines are no records.
        actions: Of the `last` records: how often each action was taken.
        reasons: Of the `last` records: how many incidents for each reason.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.latest: StepRecord | None = None
        self.curve: deque[StepRecord] = deque(maxlen=min(last, CURVE))
        self.incidents: deque[StepRecord] = deque(maxlen=INCIDENTS)
        self.n_records = 0
        self.n_incidents = 0
        self.damaged = 0
        self.actions: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._window: deque[tuple[str, str | None]] = deque()

    def catch_up(self, lines: Iterable[bytes]) -> None:
        """Takes what a run has written so far; before its `last` lines, only incidents are parsed:
        that takes a thirtieth of the time.
        """
        latest: deque[bytes] = deque(maxlen=self.last)
        for line in lines:
            if len(latest) == self.last:
                self._pass_over(latest[0])
            latest.append(line)
        for line in latest:
            self.feed(line)

    def _pass_over(self, line: bytes) -> None:
        self.n_records += 1
        if INCIDENT not in line:
            return
        try:
            record = bounded(parse_record(line))
        except ValueError:
            return
        if record.is_incident:
            self.n_incidents += 1
            self.incidents.append(record)

    def feed(self, line: bytes) -> None:
        """Takes one line; one that is no record is counted."""
        if not line.strip():
            return
        try:
            record = bounded(parse_record(line))
        except ValueError:
            self.damaged += 1
            return
        self.latest = record
        self.n_records += 1
        self.curve.append(record)
        if record.is_incident:
            self.n_incidents += 1
            self.incidents.append(record)
        self._count(record)

    @property
    def in_window(self) -> int:
        """How many records the counts are about: `last`, or all there are."""
        return len(self._window)

    @property
    def incidents_in_window(self) -> int:
        """How many of the `last` records are incidents."""
        return self.reasons.total()

    def _count(self, record: StepRecord) -> None:
        # Interned, a million of them are a million pointers to a handful of strings.
        action = sys.intern(record.action)
        reason = sys.intern(record.reason or record.action) if record.is_incident else None
        self._window.append((action, reason))
        self.actions[action] += 1
        if reason is not None:
            self.reasons[reason] += 1
        if len(self._window) > self.last:
            action, reason = self._window.popleft()
            _decrement(self.actions, action)
            if reason is not None:
                _decrement(self.reasons, reason)


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def bounded(record: StepRecord) -> StepRecord:
    """The record without what no screen has room for: long names and tags, hundreds of losses.

    Example:
        >>> record = StepRecord(1, 1.0, 1.0, "applied", tag="x" * 10**6, spikes=("a",) * 10**6)
        >>> len(bounded(record).tag) < 3000, len(bounded(record).spikes)
        (True, 64)
    """
    culprits = record.culprits[:NAMED_CULPRITS]
    return replace(
        record,
        action=_name(record.action),
        reason=None if record.reason is None else _name(record.reason),
        culprits=tuple((_name(name), *counts) for name, *counts in culprits),
        losses={_name(k): v for k, v in islice(record.losses.items(), MOST_NAMES)},
        spikes=tuple(map(_name, record.spikes[:MOST_NAMES])),
        thresholds={_name(k): v for k, v in islice(record.thresholds.items(), MOST_NAMES)},
        tag=shortened(record.tag, room=MOST_OF_A_TAG),
    )


def _name(name: str) -> str:
    return name if len(name) <= MOST_OF_A_NAME else name[: MOST_OF_A_NAME - 1] + "…"


class Rate:
    """Steps a second, over the last `RATE_SECONDS`.

    Records carry no time, so it is the time of their arrival that counts.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, n_records: int) -> float | None:
        """Takes how many records there are `now`, in seconds; the rate, once there is one."""
        self._samples.append((now, n_records))
        while len(self._samples) > 1 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()
        start, before = self._samples[0]
        return (n_records - before) / (now - start) if now - start >= 1.0 else None
