"""What a dialect makes of one line: where in the run it was written, and what in it is bad."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from fastguard.commands.scan.values import Value

INT = r"\d{1,15}"
"""The pattern of a number in a log: no more digits than every integer type and `int` take."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run, in the log's own numbers; None: not said.

    Attributes:
        epoch: Epoch; fractional in logs that count so.
        epochs: Of how many.
        batch: Batch within the epoch, as a progress bar counts: those that are done.
        batches: Of how many.
        step: Step of the whole run.
    """

    epoch: float | None = None
    epochs: int | None = None
    batch: int | None = None
    batches: int | None = None
    step: int | None = None

    def within(self, last: Place) -> Place:
        """This place, completed by the last one that was known before it."""
        if self.epoch is None:
            own = {f.name: getattr(self, f.name) for f in fields(self)}
            known = {name: value for name, value in own.items() if value is not None}
            return replace(last, **known)
        return self


@dataclass(frozen=True, slots=True)
class Reading:
    """A line of a training log.

    Attributes:
        dialect: Who wrote such lines.
        place: Where it was written.
        bad: The values in it that are NaN or Inf.
        measured: Whether it tells of losses or norms at all: if it does, and none is bad, then the
            run is finite here.
    """

    dialect: str
    place: Place
    bad: tuple[Value, ...] = ()
    measured: bool = True
