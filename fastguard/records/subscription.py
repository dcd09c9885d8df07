"""`Inbox`: the records of a run for one who acts on them, such as a schedule.

All inboxes of a run are filled at the same moment, which is the same on every rank and every rerun.
Who must know more may ask ahead, for itself alone: what others do depends on when they are told.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord

log = logging.getLogger("fastguard")


class Inbox(deque["StepRecord"]):
    """Records in order, each once; take them out with `popleft`.

    The run holds it weakly: an inbox that nobody holds any more gets nothing. Beyond `maxlen`
    records the oldest are lost, which is said once.

    Args:
        records: To begin with.
        maxlen: How many it holds.
        recorder: Fills it.
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
        self._taken = 0  # of those in the source
        self._said = False

    def settle(self) -> None:
        """Takes in the records of all steps so far, ahead of the other inboxes. Waits for them."""
        self.receive(self._waiting())

    def coming(self) -> list[StepRecord]:
        """The records of steps so far that are still to come here. Waits for them."""
        waiting = self._waiting()
        return [*self._expected, *waiting[self._taken_of(waiting) :]]

    def expect(self, records: Sequence[StepRecord]) -> None:
        """Records of a run that this one goes on from, to come with the next ones."""
        self._expected = list(records)

    def receive(self, records: Sequence[StepRecord]) -> None:
        """Takes in what is expected, and of those that wait for all inboxes what is new here.

        Args:
            records: All that wait. The same list grows until it has been delivered to every inbox.
                After an interrupt it may be given again.
        """
        taken = self._taken_of(records)
        new = [*self._expected, *records[taken:]] if self._expected or taken else records
        if new and not (self and self[-1] is new[-1]):  # the latter: interrupted right here
            overflows = self.maxlen is not None and len(self) + len(new) > self.maxlen
            self.extend(new)
            if overflows and not self._said:
                self._said = True
                log.warning(
                    "an inbox is full: %d records that nobody takes out; the oldest are lost",
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
