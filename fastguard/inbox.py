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
    from fastguard.records import Recorder, StepRecord

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
        self._told = 0  # of those that the others are still to get
        self._said = False

    def settle(self) -> None:
        """Takes in the records of all steps so far, ahead of the other inboxes. Waits for them."""
        waiting = self._waiting()
        self.receive(waiting)
        self._told = len(waiting)

    def coming(self) -> list[StepRecord]:
        """The records of steps so far that are still to come here. Waits for them."""
        return [*self._expected, *self._waiting()[self._told :]]

    def expect(self, records: Sequence[StepRecord]) -> None:
        """Records of a run that this one goes on from, to come with the next ones."""
        self._expected = list(records)

    def receive(self, records: Sequence[StepRecord]) -> None:
        """Takes in what is expected, and of those that wait for all inboxes what is new here."""
        if self._expected or self._told:
            records = [*self._expected, *records[self._told :]]
            self._expected, self._told = [], 0
        overflows = self.maxlen is not None and len(self) + len(records) > self.maxlen
        self.extend(records)
        if overflows and not self._said:
            self._said = True
            log.warning(
                "an inbox is full: %d records that nobody takes out; the oldest are lost", len(self)
            )

    def pass_over(self) -> None:
        """Those that wait for all inboxes will never come."""
        self._told = 0

    def _waiting(self) -> Sequence[StepRecord]:
        if self._recorder is None:
            return ()
        self._recorder.wait()
        return self._recorder.undelivered
