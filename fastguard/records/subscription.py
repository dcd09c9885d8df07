"""`Inbox`: delivers the records of a run to code that acts on them, such as a schedule.

All inboxes of a run are filled at the same moment, which is the same on every rank and every rerun.
An owner may ask for records earlier, for its own inbox only, because other subscribers' behaviour
depends on when they receive records.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastguard.records.recorder import Recorder
from fastguard.records.step_record import StepRecord

log: logging.Logger = logging.getLogger("fastguard")


class Inbox(deque["StepRecord"]):
    """A queue of records in order, each once; take them out with `popleft`.

    The run holds a weak reference: an inbox without an owner receives nothing. Beyond `maxlen`
    records the oldest are lost, and one warning is logged.

    Args:
        records: Initial records.
        maxlen: Maximum number of records.
        recorder: The recorder that fills it.
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
        self._taken = 0  # number taken from the source
        self._said = False

    def settle(self) -> None:
        """Takes the records of all steps so far, before the other inboxes. Waits for them."""
        self.receive(self._waiting())

    def coming(self) -> list[StepRecord]:
        """Returns the records of steps so far that have not arrived here. Waits for them."""
        waiting = self._waiting()
        return [*self._expected, *waiting[self._taken_of(waiting) :]]

    def expect(self, records: Sequence[StepRecord]) -> None:
        """Adds records of a run that this one continues, to arrive with the next ones."""
        self._expected = list(records)

    def receive(self, records: Sequence[StepRecord]) -> None:
        """Takes expected records, and those waiting for all inboxes that are new here.

        Args:
            records: All waiting records. The same list grows until it has been delivered to every
                inbox. After an interrupt it may be passed again.
        """
        taken = self._taken_of(records)
        new = [*self._expected, *records[taken:]] if self._expected or taken else records
        if new and not (self and self[-1] is new[-1]):  # the second part: interrupted right here
            overflows = self.maxlen is not None and len(self) + len(new) > self.maxlen
            self.extend(new)
            if overflows and not self._said:
                self._said = True
                log.warning(
                    "an inbox is full: %d records that its owner does not take; the oldest are "
                    "lost",
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
