"""`Recorder`: makes the records of a run and delivers them.

On a GPU a record is packed on the device and copied to the host after the step, without blocking.
On a CPU its numbers are available at once. For steps without an incident, and without sinks or
subscribers, the `StepRecord`s are created later, many at a time. A record costs 4 µs in a batch,
but 15 µs right after a step, when the caches are filled with the model.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from fastguard.errors.logger import log
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import TRACED
from fastguard.records.advice import LONGEST_SEARCH, Advice
from fastguard.records.device_row import ROWS, Outcome, Ring
from fastguard.records.incident_lines import IncidentLines
from fastguard.records.step_record import StepRecord
from fastguard.records.subscription import Inbox
from fastguard.records.unfinished import Pending, Settled, send_watched
from fastguard.stages.contract import HostVerdict, Known

KEPT = 4096
"""Number of records kept for `records()` and for `history`; older records are dropped."""

BATCH = ROWS // 2
"""Number of records that are in transfer or have arrived before any is made, without incidents."""

INBOX = 1 << 16
"""Maximum number of records kept for a subscriber that takes none. They take 36 MB, and cover more
steps than most epochs have.
"""

T = TypeVar("T")


class Recorder:
    """Collects the records of a run and logs its incidents.

    Incidents are logged as warnings of the `fastguard` logger, and overflows that only lower a loss
    scale at level INFO. Frequent repeats are only counted. Memory is bounded: `KEPT` finished
    records, `ROWS` in transfer or not yet made, and `INBOX` per live subscriber.

    One thread takes the steps; others may read records at the same time. One thread at a time
    finishes records.

    Attributes:
        finished: Finished records that `drain` has not returned yet.
        history: The last finished records, including those that `drain` has returned.
        limit_is_given: Whether the limit of the norm is given, not learned from earlier norms.
            None: the guard cannot clip, so that gradients may be clipped before they reach it.
        longest_search: Steps in a row that a loss scaler may skip to find its scale.
        last: The last finished record; None: there is none.
        sinks: Called with each finished record.
        undelivered: Finished records not yet delivered to the subscribers.
    """

    _all: ClassVar[weakref.WeakSet[Recorder]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.finished: deque[StepRecord] = deque(maxlen=KEPT)
        self.history: deque[StepRecord] = deque(maxlen=KEPT)
        self.limit_is_given: bool | None = True
        self.longest_search = LONGEST_SEARCH
        self._advice = Advice()
        self._lines = IncidentLines()
        self.last: StepRecord | None = None
        self._ring: Ring | None = None
        self._newest: object = None
        self._pending: deque[Pending | Settled] = deque()
        self._unseen: deque[Pending] = deque()  # those not known to have arrived
        self._made: tuple[object, StepRecord] | None = None
        self._logged: StepRecord | None = None  # the newest record passed to the log
        self._called: tuple[StepRecord | None, int, int] = (None, 0, 0)
        self.sinks: list[Callable[[StepRecord], object]] = []
        self._failed_sinks: set[int] = set()
        self._inboxes: list[weakref.ref[Inbox]] = []
        self.undelivered: list[StepRecord] = []
        # The lock is reentrant, since a sink may ask for records, and an interrupted thread may
        # call again.
        self._finishing = threading.RLock()
        self._all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # Sinks and subscribers are not copied, since they belong to the run.
        self.wait()
        names = ("finished", "history", "limit_is_given", "last")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    @classmethod
    def release_all(cls) -> None:
        """Releases in a forked child the locks that other threads of its parent held."""
        for recorder in list(cls._all):
            recorder._finishing = threading.RLock()

    def add(self, outcome: Outcome) -> None:
        """Adds the outcome of a step. Blocks only if the device is `ROWS` steps behind.

        After an interrupt, it may be called again with the same outcome, and resumes.

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
            self._pending.append(Settled.of(outcome))
            self._newest = outcome.key
        is_joint = outcome.signals.bad_ranks is not None
        if is_joint or known.reason or self.sinks or self._inboxes:
            self.wait()  # this blocks only if the model was on a device before
        elif len(self._pending) >= ROWS:
            self.poll()

    def send(self, outcome: Outcome) -> None:
        """Adds the outcome of a step decided on the device: packs it and starts its transfer."""
        if self._has(outcome.key):
            return
        device, ring = outcome.stats.summary.device, self._ring
        if ring is None or ring.width < outcome.width or ring.device != device:
            ring = self._ring = Ring(device, outcome.width)
        if len(self._pending) >= ROWS and (oldest := self._oldest()) is not None:
            oldest.arrival.wait()
        if self._is_due():
            self.poll()
        watched = send_watched(outcome)
        pending = Pending.of(outcome, ring.send(outcome), watched)
        self._unseen.append(pending)
        self._pending.append(pending)
        self._newest = outcome.key

    def _is_due(self) -> bool:
        """Whether records should be finished now, and not later in a batch."""
        if self.sinks or self._inboxes or len(self._pending) >= BATCH:
            return True
        unseen = self._unseen
        while unseen and unseen[0].arrival.has_arrived():
            if unseen.popleft().is_due:
                return True
        return False

    def _has(self, key: object) -> bool:
        """Whether this step is the step that was added last."""
        if key is self._newest:
            return True
        newest = _newest(self._pending)
        return newest is not None and newest.key is key

    def _oldest(self) -> Pending | Settled | None:
        """Returns the oldest unfinished record; None if another thread has finished it."""
        try:
            return self._pending[0]
        except IndexError:
            return None

    def poll(self) -> None:
        """Finishes the records that have arrived, unless another thread does. Never blocks."""
        if not self._finishing.acquire(blocking=False):
            return
        try:
            while (oldest := self._oldest()) is not None and oldest.arrival.has_arrived():
                self._finish_oldest(oldest)
        finally:
            self._finishing.release()

    def wait(self) -> StepRecord | None:
        """Waits for the records of all steps so far and returns the last one."""
        while (oldest := self._oldest()) is not None:
            oldest.arrival.wait()
            with self._finishing:
                if self._oldest() is oldest:
                    self._finish_oldest(oldest)
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
        # finishes records first, since a new sink does not get records of earlier steps
        self.poll()
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
        # iterates over a copy, since a subscriber may disappear meanwhile
        for ref in self._inboxes[:]:
            if (inbox := ref()) is not None:
                inbox.receive(self.undelivered)
        self.undelivered = []  # a new list, since inboxes count what they took from each list
        return last

    def drain(self) -> list[StepRecord]:
        """Returns the finished records since the last call, oldest first. Never blocks."""
        self.poll()
        records: list[StepRecord] = []
        try:
            while True:  # `list` and `clear` would lose records that another thread adds in between
                records.append(self.finished.popleft())
        except IndexError:
            return records

    def _finish_oldest(self, oldest: Pending | Settled) -> None:
        """Delivers the oldest record, then removes it from the queue.

        After an interrupt, the next call repeats it; each recipient still gets the record only
        once. A sink or a logging handler may call `wait` meanwhile, which finishes this record and
        the next ones.
        """
        made = self._made
        if made is None or made[0] is not oldest:
            made = self._made = oldest, oldest.record()
        record = made[1]
        self._finish(record)
        if self._oldest() is oldest and self._logged is not record:
            self._log(record)
        if self._oldest() is oldest:
            self._pending.popleft()

    def _finish(self, record: StepRecord) -> None:
        self.last = record
        for records in (self.finished, self.history):
            if _newest(records) is not record:
                records.append(record)
        if self._inboxes and _newest(self.undelivered) is not record:
            self.undelivered.append(record)
        if self.sinks:
            self._call_sinks(record)

    def _log(self, record: StepRecord) -> None:
        try:
            # set before the call, since a logging handler may ask for the records
            self._logged = record
            self._lines.add(record)
            given = self.limit_is_given
            max_norm = None if given is None else record.limit if given else math.inf
            self._advice.check(record, max_norm, self.longest_search)
        except BaseException:
            self._logged = None
            raise

    def _call_sinks(self, record: StepRecord) -> None:
        """Calls each sink once.

        A sink that was interrupted is called a second time, but not a third, since the sink itself
        may be what raises the interrupt.
        """
        if self._called[0] is not record:
            self._called = (record, 0, 0)
        # Ends early if a sink asked for records, because that request has passed this record to the
        # other sinks, and may have continued with the next record.
        while self._called[0] is record and (k := self._called[1]) < len(self.sinks):
            tries = self._called[2]
            try:
                # Set before the call, since the sink may ask for records.
                self._called = (record, k + 1, 0)
                self.sinks[k](record)
            except Exception as error:  # a sink may raise any error; the run continues
                self._warn_once(self.sinks[k], error)
            except BaseException:
                if self._called[0] is record:
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Recorder.release_all)


def _newest(records: Sequence[T]) -> T | None:
    """Returns the last item; None if there is none, perhaps because another thread took it."""
    try:
        return records[-1]
    except IndexError:
        return None
