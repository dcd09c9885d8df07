"""`summarize`: reads the records of a run in one pass and keeps only what the report shows."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from fastguard.commands.report.clock import Clock, clock_of
from fastguard.commands.report.columns import TIME, ColumnReader, Columns, Series
from fastguard.commands.report.downsample import Curve, downsample, shift_for
from fastguard.commands.report.evidence import Evidence
from fastguard.commands.report.incidents import IncidentTable
from fastguard.commands.report.tally import Tally
from fastguard.commands.report.watched import Watched
from fastguard.records.layers import layer_of
from fastguard.records.read_json_lines import Block
from fastguard.records.run_header import RunHeader, header_of

BUCKETS = 1024
"""Maximum number of buckets. At two points per bucket, this exceeds the width of a screen."""

REACH = 16
"""Number of steps before and after the first step of an incident that are drawn individually."""

_HEAT_BUCKETS = 128
_EXACT_BUCKETS = 1024
_MAX_JUMPS = 200


@dataclass(frozen=True, slots=True)
class Jump:
    """A place where the step number went back: a rollback, a resume, or another run in the file.

    Attributes:
        record: Index of the first record after the jump, from 0.
        from_step: Step number of the preceding record.
        to_step: Step number of the record after the jump.
    """

    record: int
    from_step: int
    to_step: int


@dataclass(slots=True)
class Summary:
    """Summary of a run; its size does not depend on the length of the run.

    Attributes:
        records: Number of records read, including steps that were repeated after a rollback.
        damaged: Number of lines that are not valid records.
        size: Bytes read.
        first_step, last_step: The lowest and the highest step number.
        actions: Records by action.
        scale_searches: Steps skipped only to lower a loss scale; these are not incidents.
        shift: A bucket is `2**shift` steps wide.
        curves: Every series that has a finite value, downsampled; the steps around the first
            incident of each row of the table are drawn individually.
        events: Counts of bad steps; the key is reason and action, joined by a line feed.
        layers: Counts of bad steps per layer that contains a culprit.
        layer_steps: Like `layers`, for each step; bucketed only if a layer has more than 1024 bad
            steps.
        table: The incidents.
        evidence: What the incidents have in common.
        watched: Measurements of the watched steps.
        jumps: Where the step number went back, the first 200 times.
        n_jumps: How often the step number went back.
        unnamed_losses: Whether there were more losses than are drawn.
        clock: The times of the steps; None if the records contain no times.
        header: The last header, or None.
        starts: Number of processes that wrote records; each wrote its own header.
    """

    records: int = 0
    damaged: int = 0
    size: int = 0
    first_step: int = 0
    last_step: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    scale_searches: int = 0
    shift: int = 0
    curves: dict[Series, Curve] = field(default_factory=dict)
    events: Tally = field(default_factory=lambda: Tally(BUCKETS))
    layers: Tally = field(default_factory=lambda: Tally(_HEAT_BUCKETS, names=256))
    layer_steps: Tally = field(default_factory=lambda: Tally(_EXACT_BUCKETS, names=256))
    table: IncidentTable = field(default_factory=IncidentTable)
    evidence: Evidence = field(default_factory=Evidence)
    watched: Watched = field(default_factory=Watched)
    jumps: list[Jump] = field(default_factory=list)
    n_jumps: int = 0
    unnamed_losses: bool = False
    clock: Clock | None = None
    header: RunHeader | None = None
    starts: int = 0

    @property
    def survived(self) -> bool:
        """Whether a good step follows the last incident, and no replicas differ any longer.

        Steps that did not compare the replicas are no evidence that they are equal.
        """
        return not self.ends_in_incident and not self.watched.drifting

    @property
    def ends_in_incident(self) -> bool:
        """Whether the last step was bad."""
        return self.table.is_open(self.records)


def summarize(
    blocks: Iterable[Block], *, progress: Callable[[int], object] | None = None
) -> Summary:
    """Summarizes a run; takes 8 bytes of memory per drawn value until downsampling.

    Args:
        blocks: The records, oldest first.
        progress: Called with the size in bytes of each block that has been read.
    """
    summary, reader = Summary(), ColumnReader()
    parts: list[_Part] = []
    before = -1
    with _no_garbage_collection():
        for block in blocks:
            columns = reader.read(block.records)
            summary.size += block.size
            summary.damaged += block.damaged + columns.rejected
            for header in map(header_of, block.headers):
                # A rotated file repeats the header of the previous file.
                summary.starts += summary.header is None or header.time != summary.header.time
                summary.header = header
            if len(columns.step):
                parts.append(_take(summary, columns, before))
                before = int(columns.step[-1])
            if progress is not None:
                progress(block.size)
    summary.table.shorten()
    if parts:
        _downsample(summary, parts)
    summary.unnamed_losses = reader.unnamed
    return summary


class _Part(NamedTuple):
    """The drawn part of a block: arrays `(n,)` of int64, bool, and float64 per series."""

    step: np.ndarray
    good: np.ndarray
    values: dict[Series, np.ndarray]


def _take(summary: Summary, columns: Columns, before: int) -> _Part:
    """Adds one block; `before` is the step of the preceding record."""
    step = columns.step
    low, high = int(step.min()), int(step.max())
    summary.first_step = min(summary.first_step, low) if summary.records else low
    summary.last_step = max(summary.last_step, high)
    summary.actions += columns.actions
    went_back = _jumps(summary, step, before)
    good = np.ones(len(step), bool)
    for bad in columns.bad:
        good[bad.row] = False
        record = summary.records + bad.row
        if not bad.is_incident:
            summary.scale_searches += 1
            summary.table.pass_over(record, went_back=bad.row in went_back)
            continue
        if summary.table.add(record, bad, went_back=bad.row in went_back):
            summary.evidence.add(bad)
        summary.events.add(f"{bad.reason}\n{bad.action}", bad.step)
        for layer in {layer_of(culprit[0]) for culprit in bad.culprits}:
            summary.layers.add(layer, bad.step)
            summary.layer_steps.add(layer, bad.step)
    for watched_step, watch in columns.watched:
        summary.watched.add(watched_step, watch)
    summary.records += len(step)
    return _Part(step, good, columns.values)


def _downsample(summary: Summary, parts: list[_Part]) -> None:
    step = np.concatenate([part.step for part in parts])
    good = np.concatenate([part.good for part in parts])
    near = np.zeros(len(step), bool)
    for row in summary.table.rows:
        near[max(0, row.begin - REACH) : row.begin + REACH + 1] = True
    summary.shift = shift_for(step, BUCKETS)
    for series in dict.fromkeys(chain.from_iterable(part.values for part in parts)):
        value = np.concatenate([p.values.get(series, np.full(len(p.step), np.nan)) for p in parts])
        if series == TIME:
            summary.clock = clock_of(step, value, shift=summary.shift, near=near)
            continue
        curve = downsample(step, value, shift=summary.shift, good=good, near=near)
        if curve is not None:
            summary.curves[series] = curve


def _jumps(summary: Summary, step: np.ndarray, before: int) -> set[int]:
    """Records and returns the rows at which the step number does not increase."""
    previous = np.concatenate([[before], step[:-1]])
    rows = np.flatnonzero(step <= previous).tolist()
    summary.n_jumps += len(rows)
    for row in rows[: _MAX_JUMPS - len(summary.jumps)]:
        summary.jumps.append(Jump(summary.records + row, int(previous[row]), int(step[row])))
    return set(rows)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pauses garbage collection, which would take a quarter of the time.

    The collector would search thousands of new dicts for reference cycles, but records contain
    none.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
