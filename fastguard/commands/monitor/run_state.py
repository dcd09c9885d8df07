"""`RunState`: the state of a run, from its latest records."""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from fastguard.errors import NAMED_CULPRITS
from fastguard.records.layers import layer_norms
from fastguard.records.read_json_lines import parse_record
from fastguard.records.run_header import RunHeader, begins_as_header, parse_header
from fastguard.records.step_record import REPLICA_DRIFT, StepRecord
from fastguard.records.strict_json import shortened

CURVE = 4096
"""Maximum number of records kept for the curves."""

INCIDENTS = 100
"""Maximum number of incidents kept for listing; further incidents are only counted."""

INCIDENT = b'"reason": "'
"""`JsonLinesSink` writes this in the line of a step with a reason; other lines contain null."""

_NO_COUNTS = b'"nan": 0, "posinf": 0, "neginf": 0,'

LAYERS = 3
"""Number of layers shown; the layers with the largest gradient norms are shown."""

MAX_NAMES = 64
"""Maximum number of losses, thresholds and spikes kept per record."""

MAX_NAME_LENGTH, MAX_TAG_LENGTH = 200, 2000
"""Maximum length in characters of a name and of a tag."""

RATE_SECONDS = 30.0
"""Window in seconds over which the rate is measured."""


class RunState:
    """The state of a run, updated line by line. Its memory depends only on `last`.

    Args:
        last: Number of records covered by the counts and the verdict.

    Attributes:
        latest: The last record, or None.
        curve: The last records, at most `CURVE` and at most `last`.
        incidents: The last incidents, oldest first, including those before the `last` records.
        n_records: Total number of records.
        n_incidents: Total number of incidents.
        damaged: Number of lines that are neither valid records nor headers.
        header: The latest header, or None.
        actions: Number of times each action was taken in the `last` records.
        reasons: Number of incidents per reason in the `last` records.
        layers: The `LAYERS` largest gradient norms by layer, largest first, at the latest step that
            recorded them.
        layers_step: The step of `layers`.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.latest: StepRecord | None = None
        self.header: RunHeader | None = None
        self.curve: deque[StepRecord] = deque(maxlen=min(last, CURVE))
        self.incidents: deque[StepRecord] = deque(maxlen=INCIDENTS)
        self.n_records: int = 0
        self.n_incidents: int = 0
        self.damaged: int = 0
        self.actions: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.layers: dict[str, float] = {}
        self.layers_step: int = 0
        self._window: deque[tuple[str, str | None]] = deque()

    def catch_up(self, lines: Iterable[bytes]) -> None:
        """Adds the lines that the run has written so far, oldest first.

        Of all lines before the `last` lines, only incidents are parsed, which is 15 times faster.
        """
        latest: deque[bytes] = deque(maxlen=self.last)
        for line in lines:
            if begins_as_header(line):
                self.feed(line)
                continue
            if len(latest) == self.last:
                self._add_old_line(latest[0])
            latest.append(line)
        for line in latest:
            self.feed(line)

    def _add_old_line(self, line: bytes) -> None:
        self.n_records += 1
        if not _may_be_incident(line):
            return
        try:
            record = bounded(parse_record(line))
        except ValueError:
            return
        if is_incident(record):
            self.n_incidents += 1
            self.incidents.append(record)

    def feed(self, line: bytes) -> None:
        """Adds one line; a line that is neither a valid record nor a header counts as damaged."""
        if not line.strip():
            return
        try:
            whole = parse_record(line)
        except ValueError:
            header = parse_header(line)
            self.header = header or self.header
            self.damaged += header is None
            return
        record = bounded(whole)
        norms = layer_norms(whole.watch)
        if norms:
            most = sorted(norms, key=norms.__getitem__, reverse=True)[:LAYERS]
            self.layers = {_name(layer): norms[layer] for layer in most}
            self.layers_step = record.step
        self.latest = record
        self.n_records += 1
        self.curve.append(record)
        if is_incident(record):
            self.n_incidents += 1
            self.incidents.append(record)
        self._count(record)

    @property
    def in_window(self) -> int:
        """Number of records covered by the counts: `last`, or all records if there are fewer."""
        return len(self._window)

    @property
    def incidents_in_window(self) -> int:
        """Number of incidents among the `last` records."""
        return self.reasons.total()

    def _count(self, record: StepRecord) -> None:
        # Strings are interned, so that a million records share a few strings.
        action = sys.intern(record.action)
        reason = sys.intern(record.reason or record.action) if is_incident(record) else None
        self._window.append((action, reason))
        self.actions[action] += 1
        if reason is not None:
            self.reasons[reason] += 1
        if len(self._window) > self.last:
            action, reason = self._window.popleft()
            _decrement(self.actions, action)
            if reason is not None:
                _decrement(self.reasons, reason)


def _may_be_incident(line: bytes) -> bool:
    """Whether a line has a reason or a non-finite value, which `JsonLinesSink` writes in quotes."""
    if INCIDENT in line or b'"total_norm": "' in line or _NO_COUNTS not in line:
        return True
    start = line.find(b'"losses": {')
    return b'": "' in line[start : line.find(b'"spikes"', start)]


def is_incident(record: StepRecord) -> bool:
    """Whether a step is an incident or has a non-finite value, by the rule of `fastguard report`.

    With `nonfinite="propagate"` such a step is applied, without a reason.
    """
    if record.reason is not None or record.is_incident:
        return record.is_incident
    values = (record.torch_norm, *record.losses.values())
    return record.n_culprits > 0 or not all(map(math.isfinite, values))


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def bounded(record: StepRecord) -> StepRecord:
    """Shortens a record to what a screen can show.

    Limits the length of names and tags and the number of losses, and keeps only the replica drift
    of `watch`.

    Example:
        >>> record = StepRecord(1, 1.0, 1.0, "applied", tag="x" * 10**6, spikes=("a",) * 10**6)
        >>> len(bounded(record).tag) < 3000, len(bounded(record).spikes)
        (True, 64)
    """
    culprits = record.culprits[:NAMED_CULPRITS]
    drift = {key: value for key, value in record.watch.items() if key == REPLICA_DRIFT}
    return replace(
        record,
        action=_name(record.action),
        reason=None if record.reason is None else _name(record.reason),
        culprits=tuple((_name(name), *counts) for name, *counts in culprits),
        losses={_name(k): v for k, v in islice(record.losses.items(), MAX_NAMES)},
        spikes=tuple(map(_name, record.spikes[:MAX_NAMES])),
        thresholds={_name(k): v for k, v in islice(record.thresholds.items(), MAX_NAMES)},
        tag=shortened(record.tag, room=MAX_TAG_LENGTH),
        watch=shortened(drift, room=MAX_TAG_LENGTH) if drift else {},
    )


def _name(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


class Rate:
    """Steps per second over the last `RATE_SECONDS`.

    Uses the arrival times of records, because the clock of this machine may differ from the clock
    of the run.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, n_records: int) -> float | None:
        """Adds the record count at time `now` (seconds); returns the rate once it is known."""
        self._samples.append((now, n_records))
        while len(self._samples) > 1 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()
        start, before = self._samples[0]
        return (n_records - before) / (now - start) if now - start >= 1.0 else None
