"""`Recorder`: makes the records of a run and delivers them.

On a GPU a record is packed on the device and copied to the host after the step, without blocking.
On a CPU its numbers are available at once. For steps without an incident, and without sinks or
subscribers, the `StepRecord`s are made later, many at a time: one costs 4 µs in a batch, but 15 µs
right after a step, when the caches are full of the model.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.errors import NAMED_CULPRITS, Culprit
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import TRACED
from fastguard.records.advice import LONGEST_SEARCH, Advice
from fastguard.records.device_row import ROWS, Arrival, Outcome, Ring, Watched, unpack
from fastguard.records.incident_lines import IncidentLines
from fastguard.records.step_record import REPLICA_DRIFT, StepRecord
from fastguard.records.subscription import Inbox
from fastguard.stages.contract import HostVerdict, Known
from fastguard.stages.reason import Reason

log: logging.Logger = logging.getLogger("fastguard")

KEPT = 4096
"""Number of records kept for `records()` and for `history`; older ones are dropped."""

INBOX = 1 << 16
"""Number of records kept for a subscriber that takes none: 36 MB, and more steps than most epochs
have."""

# By number, because creating a Reason costs as much as the rest of a record.
_LABELS = tuple(reason.label for reason in Reason)


def record_now(outcome: Outcome) -> StepRecord:
    """Returns the record of a step decided on the host, where all values are available."""
    return _Known.of(outcome).record()


def _record(
    known: Known,
    signal_names: Sequence[str],
    lr: float,
    tag: Any,
    culprits: Sequence[Culprit],
    n_culprits: int,
    ranks: tuple[int, int | None],
    limit: float,
    watch: dict[str, Any],
) -> StepRecord:
    differ = any(watch.get(REPLICA_DRIFT, {}).values())
    nan, posinf, neginf = known.nonfinite_counts
    return StepRecord(
        step=known.step,
        total_norm=known.total_norm,
        clip_coef=known.clip_coef,
        action=_action(known.clip_coef, known.skipped, known.cleaned),
        reason=_LABELS[known.reason] or (REPLICA_DRIFT if differ else None),
        nan=nan,
        posinf=posinf,
        neginf=neginf,
        culprits=tuple(culprits[:NAMED_CULPRITS]),
        n_culprits=n_culprits,
        losses=dict(known.losses),
        spikes=tuple(compress(signal_names, known.spikes)),
        thresholds=dict(zip(signal_names, known.thresholds, strict=True)),
        consecutive_skips=known.consecutive_skips,
        lr=lr,
        tag=tag,
        culprit_ranks=ranks[0],
        culprit_rank=ranks[1],
        limit=limit,
        watch=watch,
    )


def _action(coef: float, skipped: bool, cleaned: bool) -> str:
    if skipped:
        return "skipped"
    if cleaned:
        return "sanitized"
    return "applied" if coef >= 1.0 else "clipped"  # also "clipped" if the coefficient is NaN


class _Known(NamedTuple):
    """The values for the record of a step decided on the host; holds no gradients."""

    key: object
    known: Known
    signal_names: Sequence[str]
    lr: float
    tag: Any
    culprits: Sequence[Culprit]
    ranks: tuple[int, int | None]
    limit: float
    watched: tuple[Watched, Tensor] | None

    arrival = Arrival(torch.empty(0, device="cpu"), None)  # already on the host

    @staticmethod
    def of(outcome: Outcome) -> _Known:
        assert isinstance(outcome.verdict, HostVerdict)
        known = outcome.verdict.known
        return _Known(
            outcome.key,
            known,
            outcome.signal_names,
            float(outcome.lr),  # converted now, since a tensor may change
            outcome.tag,
            outcome.stats.culprits() if any(known.nonfinite_counts) else (),
            outcome.signals.culprit_rank,
            float(outcome.limit) if known.limit is None else known.limit,
            None if outcome.watched is None else (outcome.watched, outcome.watched.values()),
        )

    def record(self) -> StepRecord:
        """Returns the record."""
        culprits = self.culprits
        return _record(
            self.known,
            self.signal_names,
            self.lr,
            self.tag,
            culprits,
            len(culprits),
            self.ranks,
            self.limit,
            _watch_results(self.watched, self.known),
        )


def _watch_results(watched: tuple[Watched, Tensor] | None, known: Known) -> dict[str, Any]:
    """Returns `StepRecord.watch`; the values must have reached the host."""
    return {} if watched is None else watched[0].results(watched[1].tolist(), known)


def _send_watched(outcome: Outcome) -> tuple[Watched, Tensor] | None:
    """Starts copying the values of a watched step to the host; returns them with their copy.

    Call it before `Ring.send`, whose event then covers this copy too. torch caches the pinned
    memory.
    """
    if outcome.watched is None:
        return None
    values = outcome.watched.values()
    on_gpu = values.device.type == "cuda"
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=on_gpu)
    return outcome.watched, host.copy_(values, non_blocking=on_gpu)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A record in transfer to the host, with the values that only the host knows."""

    key: object
    arrival: Arrival
    name_of: Callable[[int], str]
    loss_names: Sequence[str]
    signal_names: tuple[str, ...]
    lr: float | None
    tag: Any
    is_joint: bool
    limit: float | None
    watched: tuple[Watched, Tensor] | None

    @staticmethod
    def of(outcome: Outcome, arrival: Arrival, watched: tuple[Watched, Tensor] | None) -> _Pending:
        lr = None if outcome.lr_is_on_device else float(outcome.lr)
        return _Pending(
            outcome.key,
            arrival,
            outcome.stats.name,
            outcome.signals.loss_names,
            outcome.signal_names,
            lr,
            outcome.tag,
            outcome.is_joint,
            None if outcome.limit_is_on_device else float(outcome.limit),
            watched,
        )

    def record(self) -> StepRecord:
        """Returns the record. The row must have arrived."""
        # The names of other ranks' losses may only be known now.
        row = unpack(self.arrival.row, self.loss_names, self.is_joint, self.limit is None)
        culprits = [(self.name_of(i), n, p, m) for i, n, p, m in row.culprits]
        lr = row.lr if self.lr is None else self.lr
        limit = row.limit if self.limit is None else self.limit
        return _record(
            row.known,
            self.signal_names,
            lr,
            self.tag,
            culprits,
            row.n_culprits,
            row.ranks,
            limit,
            _watch_results(self.watched, row.known),
        )


class Recorder:
    """Collects the records of a run and logs its incidents.

    An incident is logged as a warning of the `fastguard` logger, an overflow that only lowers a
    loss scale at level INFO; frequent repeats are only counted. Memory is bounded: `KEPT` finished
    records, `ROWS` in transfer or not yet made, and `INBOX` per live subscriber.

    Attributes:
        finished: Finished records that `drain` has not returned yet.
        history: The last finished records, including those that `drain` has returned.
        max_norm: Current limit of the whole model's norm; inf: no limit.
        longest_search: Steps in a row that a loss scaler may skip to find its scale.
        last: The last finished record; None: there is none.
        sinks: Called with each finished record.
        undelivered: Finished records not yet delivered to the subscribers.
    """

    def __init__(self) -> None:
        self.finished: deque[StepRecord] = deque(maxlen=KEPT)
        self.history: deque[StepRecord] = deque(maxlen=KEPT)
        self.max_norm: float = math.inf
        self.longest_search = LONGEST_SEARCH
        self._advice = Advice()
        self._lines = IncidentLines()
        self.last: StepRecord | None = None
        self._ring: Ring | None = None
        self._newest: object = None
        self._pending: deque[_Pending | _Known] = deque()
        self._made: tuple[object, StepRecord] | None = None
        self._called: tuple[StepRecord | None, int, int] = (None, 0, 0)
        self.sinks: list[Callable[[StepRecord], object]] = []
        self._failed_sinks: set[int] = set()
        self._inboxes: list[weakref.ref[Inbox]] = []
        self.undelivered: list[StepRecord] = []

    def __getstate__(self) -> dict[str, Any]:
        # Sinks and subscribers belong to the run, not to a copy of its optimizer.
        self.wait()
        return {name: getattr(self, name) for name in ("finished", "history", "max_norm", "last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def add(self, outcome: Outcome) -> None:
        """Adds the outcome of a step. Blocks only if the device is `ROWS` steps behind.

        If it was interrupted, it may be called again with the same outcome, and resumes.

        A step captured in a CUDA graph leaves no record, since no host code runs when the graph is
        replayed. A step on placeholders has nothing to record.
        """
        if isinstance(outcome.verdict, HostVerdict):
            self._add_known(outcome, outcome.verdict.known)
        elif outcome.stats.kind is not TRACED and not (
            outcome.stats.summary.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            self.send(outcome)

    def _add_known(self, outcome: Outcome, known: Known) -> None:
        if not self._has(outcome.key):
            self._pending.append(_Known.of(outcome))
            self._newest = outcome.key
        is_joint = outcome.signals.bad_ranks is not None
        if is_joint or known.reason or self.sinks or self._inboxes:
            self.wait()  # blocks only if the model was on a device before
        elif len(self._pending) >= ROWS:
            self.poll()

    def send(self, outcome: Outcome) -> None:
        """Adds the outcome of a step decided on the device: packs it and starts its transfer."""
        if self._has(outcome.key):
            return
        device, ring = outcome.stats.summary.device, self._ring
        if ring is None or ring.width < outcome.width or ring.device != device:
            ring = self._ring = Ring(device, outcome.width)
        if len(self._pending) >= ROWS:
            self._pending[0].arrival.wait()
        self.poll()
        watched = _send_watched(outcome)
        self._pending.append(_Pending.of(outcome, ring.send(outcome), watched))
        self._newest = outcome.key

    def _has(self, key: object) -> bool:
        """Whether this step is the newest one added."""
        return key is self._newest or (bool(self._pending) and self._pending[-1].key is key)

    def poll(self) -> None:
        """Finishes the records that have arrived. Never blocks."""
        while self._pending and self._pending[0].arrival.has_arrived():
            self._finish_oldest()

    def wait(self) -> StepRecord | None:
        """Waits for the records of all steps so far and returns the last one."""
        while self._pending:
            self._pending[0].arrival.wait()
            self._finish_oldest()
        return self.last

    def forget_last(self) -> None:
        """Clears the last record after a state was loaded, so that it does not affect the next
        step."""
        self.wait()
        self.last = None
        self.undelivered = []

    @property
    def has_subscribers(self) -> bool:
        """Whether there is a subscriber to the records of this run."""
        return bool(self._inboxes)

    def add_sink(self, sink: Callable[[StepRecord], object]) -> None:
        """See `GuardedOptimizer.add_sink`."""
        self.poll()  # finished first, since a new sink does not get records of earlier steps
        self.sinks.append(sink)

    def subscribe(self) -> Inbox:
        """See `GuardedOptimizer.subscribe`."""
        self.poll()
        inbox = Inbox(maxlen=INBOX, recorder=self)
        self._inboxes.append(weakref.ref(inbox, self._inboxes.remove))
        return inbox

    def deliver(self) -> StepRecord | None:
        """Waits for the steps so far, fills the inboxes, and returns the last record."""
        last = self.wait()
        for ref in self._inboxes[:]:  # a copy: a subscriber may disappear meanwhile
            if (inbox := ref()) is not None:
                inbox.receive(self.undelivered)
        self.undelivered = []  # by a new list, the inboxes know that nothing of it was taken
        return last

    def drain(self) -> list[StepRecord]:
        """Returns the finished records since the last call, oldest first. Never blocks."""
        self.poll()
        records = list(self.finished)
        self.finished.clear()
        return records

    def _finish_oldest(self) -> None:
        """Delivers the oldest record, then removes it from the queue.

        If an interrupt stops it, the next call repeats it; each recipient still gets the record
        only once.
        """
        item = self._pending[0]
        made = self._made
        if made is None or made[0] is not item:
            made = self._made = item, item.record()
        self._finish(made[1])
        if self._pending and self._pending[0] is item:  # else a sink has called `wait` meanwhile
            self._pending.popleft()

    def _finish(self, record: StepRecord) -> None:
        if record is not self.last:
            self._lines.add(record)
            self._advice.check(record, self.max_norm, self.longest_search)
            self.last = record
        if not self.finished or self.finished[-1] is not record:
            self.finished.append(record)
        if not self.history or self.history[-1] is not record:
            self.history.append(record)
        if self._inboxes and (not self.undelivered or self.undelivered[-1] is not record):
            self.undelivered.append(record)
        if self.sinks:
            self._call_sinks(record)

    def _call_sinks(self, record: StepRecord) -> None:
        """Calls each sink once.

        A sink that was interrupted is called a second time, but not a third, since the sink itself
        may be what raises the interrupt.
        """
        while True:
            called, k, tries = self._called
            k, tries = (k, tries) if called is record else (0, 0)
            if k >= len(self.sinks):
                return
            try:
                # Set before the call, in case the sink asks for the records.
                self._called = (record, k + 1, 0)
                self.sinks[k](record)
            except Exception as error:  # a sink can fail in any way; the run continues
                self._warn_once(self.sinks[k], error)
            except BaseException:
                self._called = (record, k + 1 if tries else k, tries + 1)
                raise

    def _warn_once(self, sink: Callable[[StepRecord], object], error: Exception) -> None:
        if id(sink) not in self._failed_sinks:
            self._failed_sinks.add(id(sink))
            log.warning(
                "records are being lost: %s raised %s",
                shown(sink, 200),
                shown(error, 200),
                exc_info=error,
            )
