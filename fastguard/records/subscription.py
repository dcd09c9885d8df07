"""`Inbox`: delivers the records of a run to code that acts on them, such as a schedule.

Subscribers act on records when they receive them. All inboxes of a run are therefore filled at a
fixed point of a step, which is the same on every rank and in every rerun. The owner of an inbox may
fetch records earlier, but only for that inbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastguard.records.recorder import Recorder
from fastguard.errors.logger import log
from fastguard.records.step_record import StepRecord


class Inbox(deque["StepRecord"]):
    """A queue that receives each record of a run once, in order; remove records with `popleft`.

    The run holds only a weak reference to the inbox. If the inbox holds more than `maxlen` records,
    the oldest records are lost, and one warning is logged.

    Args:
        records: Initial records.
        maxlen: Maximum number of records.
        recorder: The recorder that fills the inbox.
    """

    def __init__(
        self,
        records: Iterable[StepRecord] = (),
        maxlen: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(records, maxlen)
        self._recorder = recorder
        self._expected: list[StepRecord] = []
        self._source: Sequence[StepRecord] = ()
        self._taken = 0  # number of records taken from the source
        self._has_warned = False

    def settle(self) -> None:
        """Fetches the records of all steps so far, for this inbox only. Waits for these steps."""
        self.receive(self._waiting())

    def coming(self) -> list[StepRecord]:
        """Waits for all steps so far, and returns the records that are not in the inbox yet."""
        waiting = self._waiting()
        return [*self._expected, *waiting[self._taken_of(waiting) :]]

    def expect(self, records: Sequence[StepRecord]) -> None:
        """Sets the records to receive first, from an earlier run that this run continues."""
        self._expected = list(records)

    def receive(self, records: Sequence[StepRecord]) -> None:
        """Adds the expected records, and the undelivered records that are new to this inbox.

        Args:
            records: All undelivered records. The same list grows until it has been delivered to
                every inbox. After an interrupt it may be passed again.
        """
        taken = self._taken_of(records)
        new = [*self._expected, *records[taken:]] if self._expected or taken else records
        # if the inbox already ends with these records, an interrupt came after `extend`
        if new and not (self and self[-1] is new[-1]):
            overflows = self.maxlen is not None and len(self) + len(new) > self.maxlen
            self.extend(new)
            if overflows and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "the inbox of a subscriber is full: it holds %d records and drops the "
                    "oldest; remove records with popleft after every step",
                    len(self),
                )
        self._source, self._taken, self._expected = records, len(records), []

    def _taken_of(self, records: Sequence[StepRecord]) -> int:
        return self._taken if records is self._source else 0

    def _waiting(self) -> Sequence[StepRecord]:
        if self._recorder is None:
            return ()
        self._recorder.wait()
        return self._recorder.undelivered
