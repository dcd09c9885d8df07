"""Groups consecutive bad steps into incidents, in a table of bounded length.

An incident begins at a bad step and ends before the next good step, or where the step number goes
back. When there are more than `2 * limit` rows, neighboring rows with the fewest steps between them
are merged until `limit` rows are left; a merged row contains the number of its incidents.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from fastguard.commands.report.columns import BadStep


@dataclass(slots=True)
class Row:
    """One incident, or several merged ones.

    Attributes:
        begin: Index of the first record in the run, from 0.
        end: Index after the last record.
        first_step, last_step: The lowest and the highest step number.
        first: The first bad step.
        steps: Number of bad steps.
        incidents: Number of incidents.
        reasons: Bad steps by reason.
        actions: Bad steps by action.
    """

    begin: int
    end: int
    first_step: int
    last_step: int
    first: BadStep
    steps: int = 1
    incidents: int = 1
    reasons: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)

    def extend(self, bad: BadStep) -> None:
        """Adds the next consecutive bad step."""
        self.end += 1
        self.first_step = min(self.first_step, bad.step)
        self.last_step = max(self.last_step, bad.step)
        self.steps += 1
        self.reasons[bad.reason] += 1
        self.actions[bad.action] += 1

    def join(self, later: Row) -> None:
        """Merges the next row into this one."""
        self.end = later.end
        self.first_step = min(self.first_step, later.first_step)
        self.last_step = max(self.last_step, later.last_step)
        self.steps += later.steps
        self.incidents += later.incidents
        self.reasons += later.reasons
        self.actions += later.actions


class IncidentTable:
    """All incidents of a run, in a bounded number of rows.

    Args:
        limit: Number of rows left after merging; merging starts above twice this number.

    Attributes:
        rows: The rows in the order of the run.
        incidents: Total number of incidents.
        steps: Total number of bad steps.
        last: The latest incident by itself, even after it was merged into a row.
    """

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.rows: list[Row] = []
        self.incidents: int = 0
        self.steps: int = 0
        self.last: Row | None = None

    def add(self, record: int, bad: BadStep, *, went_back: bool = False) -> bool:
        """Adds a bad step.

        Args:
            record: Index of the record in the run.
            bad: The step.
            went_back: Whether the step number is not above the previous record's.

        Returns:
            Whether the step begins an incident.
        """
        self.steps += 1
        if self.last is not None and record == self.last.end and not went_back:
            self.rows[-1].extend(bad)
            self.last.extend(bad)
            return False
        if len(self.rows) >= 2 * self.limit:
            self.shorten()
        self.rows.append(_row(record, bad))
        self.last = _row(record, bad)
        self.incidents += 1
        return True

    def pass_over(self, record: int, *, went_back: bool = False) -> None:
        """Skips a step that is neither good nor bad, and so does not end an incident."""
        if self.last is not None and record == self.last.end and not went_back:
            self.last.end = self.rows[-1].end = record + 1

    def shorten(self) -> None:
        """Merges neighbors until `limit` rows are left; on ties, merges earlier rows first."""
        surplus = len(self.rows) - self.limit
        if surplus <= 0:
            return
        gaps = [(b.begin - a.end, i) for i, (a, b) in enumerate(pairwise(self.rows), 1)]
        joined = {i for _, i in sorted(gaps)[:surplus]}
        rows: list[Row] = []
        for i, row in enumerate(self.rows):
            if i in joined:
                rows[-1].join(row)
            else:
                rows.append(row)
        self.rows = rows

    def is_open(self, records: int) -> bool:
        """Whether a run of this many records ends in an incident."""
        return self.last is not None and self.last.end == records


def _row(record: int, bad: BadStep) -> Row:
    return Row(
        begin=record,
        end=record + 1,
        first_step=bad.step,
        last_step=bad.step,
        first=bad,
        reasons=Counter([bad.reason]),
        actions=Counter([bad.action]),
    )
