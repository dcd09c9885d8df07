"""The result of parsing one line: its place in the run, and its bad values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastguard.commands.scan.values import Value

INT = r"[0-9]{1,15}"
"""Pattern of an integer in a log; 15 digits fit in an int64 and, exactly, in a float64."""


class Place(NamedTuple):
    """A place in a run, in the log's own numbers; None where the log does not give it.

    Attributes:
        epoch: Epoch; fractional in some logs.
        epochs: Total number of epochs.
        batch: Number of batches done in the epoch, as a progress bar shows it.
        batches: Total number of batches.
        step: Step number, counted over the whole run.
    """

    epoch: float | None = None
    epochs: int | None = None
    batch: int | None = None
    batches: int | None = None
    step: int | None = None

    def within(self, last: Place) -> Place:
        """Returns this place; if it has no epoch, takes missing fields from `last`."""
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
    """The spans of the place in a line; valid for all lines that differ from it only in digits.

    Attributes:
        epoch, epochs, batch, batches, step: `(begin, end)` of the number, or None.
    """

    epoch: Span | None = None
    epochs: Span | None = None
    batch: Span | None = None
    batches: Span | None = None
    step: Span | None = None

    def place(self, line: str | bytes) -> Place:
        """Returns the place that a line gives."""
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
        """Converts the spans to offsets in the bytes that `text` was decoded from."""
        if len(text) == len(line):
            return self
        return Where(
            *(span and (_bytes(text[: span[0]]), _bytes(text[: span[1]])) for span in self)
        )


_NO_SPANS = Where()


def whole_epoch(where: Where, line: bytes) -> bytes:
    """The epoch that a line names, without its fraction; b"" if it names none."""
    return line[slice(*where.epoch)].partition(b".")[0] if where.epoch else b""


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def span_of(match: re.Match[str] | None, *groups: int | str) -> Span | None:
    """Returns the span of the first of the given groups that matched, or None."""
    if match is None:
        return None
    return next((match.span(group) for group in groups if match[group] is not None), None)


class Reading(NamedTuple):
    """A parsed line of a training log.

    Attributes:
        dialect: Dialect of the line.
        place: Where in the run it was written.
        bad: The NaN and Inf values in the line.
        measured: Whether it reports losses or norms. If all of these are finite, the run is finite
            at this line.
        where: The spans of the place, if they are valid for all lines that differ only in digits.
        numbers: The finite losses and gradient norms, if the line is structured data.
        unread: The part of a long string that was not read, to bound the time.
    """

    dialect: str
    place: Place
    bad: tuple[Value, ...] = ()
    measured: bool = True
    where: Where | None = None
    numbers: Mapping[str, float] = MappingProxyType({})
    unread: str = ""
