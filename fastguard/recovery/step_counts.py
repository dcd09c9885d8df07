"""The step counts of `GuardedLR`, and the saved form of steps that are not processed yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastguard.records.step_record import StepRecord


class Counts(NamedTuple):
    """The counts of `GuardedLR` after a step.

    Attributes:
        backoffs: Number of back-offs in force.
        clean_steps: Applied steps in a row since the last back-off or recovery.
        applied_steps: Number of applied steps.
        is_due: Whether a step was applied since the last step of the schedule.
    """

    backoffs: int = 0
    clean_steps: int = 0
    applied_steps: int = 0
    is_due: bool = False

    def after(self, record: StepRecord, backs_off: bool, recovery: int | None) -> Counts:
        """Returns the counts that include a step.

        Args:
            record: The record of the step.
            backs_off: Whether an incident adds a back-off.
            recovery: Applied steps in a row after which one back-off is undone; None: never.
        """
        if record.action == "skipped":
            if not record.is_incident:
                return self
            return self._replace(clean_steps=0, backoffs=self.backoffs + backs_off)
        counts = Counts(self.backoffs, self.clean_steps + 1, self.applied_steps + 1, True)
        if self.backoffs and recovery is not None and counts.clean_steps >= recovery:
            return counts._replace(backoffs=self.backoffs - 1, clean_steps=0)
        return counts


def verdict_of(record: StepRecord) -> list[Any]:
    """Returns the part of a record that `GuardedLR` acts on."""
    return [record.step, record.action, record.reason]


def records_of(verdicts: Sequence[Sequence[Any]]) -> list[StepRecord]:
    """Returns records with these verdicts, in which all numbers are NaN."""
    return [StepRecord(step, math.nan, math.nan, *rest) for step, *rest in verdicts]
