"""What a dialect makes of one line: where in the run it was written, and what in it is bad."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastguard.commands.scan.values import Value

INT = r"[0-9]{1,15}"
"""The pattern of a number in a log: no more digits than every integer type and `int` take."""


class Place(NamedTuple):
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
        if self.epoch is not None or last is NOWHERE:
            return self
        return Place(
            last.epoch,
            last.epochs if self.epochs is None else self.epochs,
            last.batch if self.batch is None else self.batch,
            last.batches if self.batches is None else self.batches,
            last.step if self.step is None else self.step,
        )


NOWHERE = Place()
Span = tuple[int, int]


class Where(NamedTuple):
    """Which characters of a line say its place: those of any line that differs in digits alone.

    Attributes:
        epoch, epochs, batch, batches, step: First and last character + 1 of the number, or None.
    """

    epoch: Span | None = None
    epochs: Span | None = None
    batch: Span | None = None
    batches: Span | None = None
    step: Span | None = None

    def place(self, line: str | bytes) -> Place:
        """The place that a line names."""
        if self == _NO_SPANS:
            return NOWHERE
        epoch = None
        if self.epoch is not None:
            epoch = float(line[slice(*self.epoch)])
            epoch = int(epoch) if epoch.is_integer() else epoch
        epochs, batch, batches, step = (
            None if span is None else int(line[slice(*span)]) for span in self[1:]
        )
        return Place(epoch, epochs, batch, batches, step)

    def in_bytes(self, text: str, line: bytes) -> Where:
        """The same in the bytes that the text was read from, as UTF-8 or else as Latin-1."""
        if len(text) == len(line):
            return self
        return Where(
            *(span and (_bytes(text[: span[0]]), _bytes(text[: span[1]])) for span in self)
        )


_NO_SPANS = Where()


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def span_of(match: re.Match[str] | None, *groups: int | str) -> Span | None:
    """Where the first of these groups that took part is, or None."""
    if match is None:
        return None
    return next((match.span(group) for group in groups if match[group] is not None), None)


class Reading(NamedTuple):
    """A line of a training log.

    Attributes:
        dialect: Who wrote such lines.
        place: Where it was written.
        bad: The values in it that are NaN or Inf.
        measured: Whether it tells of losses or norms at all: if it does, and none is bad, then the
            run is finite here.
        where: Which characters say the place, if a line with other digits reads the same.
        numbers: The finite losses and gradient norms in it, if it is data.
    """

    dialect: str
    place: Place
    bad: tuple[Value, ...] = ()
    measured: bool = True
    where: Where | None = None
    numbers: Mapping[str, float] = MappingProxyType({})
