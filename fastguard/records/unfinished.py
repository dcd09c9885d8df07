"""Unfinished records: the values of a step, until they have reached the host and are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguard.errors import NAMED_CULPRITS, Culprit
from fastguard.kernels.record_row import REASON
from fastguard.records.device_row import Arrival, Outcome, Watched, unpack
from fastguard.records.step_record import REPLICA_DRIFT, StepRecord
from fastguard.stages.agc import ClippedUnits, UnitSummary
from fastguard.stages.contract import HostVerdict, Known
from fastguard.stages.grad_stats import name_in
from fastguard.stages.reason import Reason

_ARRIVED = Arrival(np.empty(0), None)
# Reasons by number, since creating a Reason costs as much as the rest of a record.
_LABELS = tuple(reason.label for reason in Reason)


def _action(coef: float, skipped: bool, cleaned: bool) -> str:
    if skipped:
        return "skipped"
    if cleaned:
        return "sanitized"
    return "applied" if coef >= 1.0 else "clipped"  # a NaN coefficient gives "clipped" too


class Settled(NamedTuple):
    """The values for the record of a step decided on the host; holds no gradients."""

    key: object
    known: Known
    signal_names: Sequence[str]
    lr: float
    tag: Any
    culprits: Sequence[Culprit]
    n_culprits: int
    ranks: tuple[int, int | None]
    limit: float
    clipped_units: tuple[int, int, tuple[str, int] | None]
    watched: tuple[Watched, Tensor] | None
    time: float

    @property
    def arrival(self) -> Arrival:
        """The values are on the host already."""
        return _ARRIVED

    @staticmethod
    def of(outcome: Outcome) -> Settled:
        """Returns the values of a step decided on the host."""
        assert isinstance(outcome.verdict, HostVerdict)
        known = outcome.verdict.known
        culprits = outcome.stats.culprits() if any(known.nonfinite_counts) else ()
        return Settled(
            outcome.key,
            known,
            outcome.signal_names,
            float(outcome.lr),  # converted to a number now, since a tensor may change
            outcome.tag,
            culprits,
            len(culprits),
            outcome.signals.culprit_rank,
            float(outcome.limit) if known.limit is None else known.limit,
            (0, 0, None) if known.skipped else _clipped_units(outcome),
            None if outcome.watched is None else (outcome.watched, outcome.watched.values()),
            outcome.time,
        )

    def record(self) -> StepRecord:
        """Returns the record. The watched values must have reached the host."""
        known = self.known
        watch: dict[str, Any] = {}
        if self.watched is not None:
            watched, values = self.watched
            watch = watched.results(values.tolist(), known)
        differ = any(watch.get(REPLICA_DRIFT, {}).values())
        nan, posinf, neginf = known.nonfinite_counts
        return StepRecord(
            step=known.step,
            total_norm=known.total_norm,
            clip_coef=known.clip_coef,
            action=_action(known.clip_coef, known.skipped, known.cleaned),
            reason=_LABELS[known.reason] or (REPLICA_DRIFT if differ else None),
            nan=nan,
            posinf=posinf,
            neginf=neginf,
            culprits=tuple(self.culprits[:NAMED_CULPRITS]),
            n_culprits=self.n_culprits,
            losses=dict(known.losses),
            spikes=tuple(compress(self.signal_names, known.spikes)),
            thresholds=dict(zip(self.signal_names, known.thresholds, strict=True)),
            consecutive_skips=known.consecutive_skips,
            lr=self.lr,
            tag=self.tag,
            culprit_ranks=self.ranks[0],
            culprit_rank=self.ranks[1],
            limit=self.limit,
            clipped_units=self.clipped_units[0],
            limited_units=self.clipped_units[1],
            most_clipped_unit=self.clipped_units[2],
            watch=watch,
            time=self.time,
        )


def _clipped_units(outcome: Outcome) -> tuple[int, int, tuple[str, int] | None]:
    """Returns the fields of the record of a step decided on the host."""
    summaries = outcome.verdict.clipped_units
    if not summaries:
        return 0, 0, None
    numbers = [x for summary in summaries for x in summary.values.tolist()]
    return _named(ClippedUnits.of(summaries, numbers), outcome.parameter_names)


def _named(
    clipped: ClippedUnits, names: Sequence[str] | None
) -> tuple[int, int, tuple[str, int] | None]:
    most = (name_in(names, clipped.position), clipped.unit) if clipped.n_clipped else None
    return clipped.n_clipped, clipped.n_units, most


def send_watched(outcome: Outcome) -> tuple[Watched, Tensor] | None:
    """Starts copying the values of a watched step to the host; returns values and copy.

    Call this function before `Ring.send`, so that the event of `send` covers this copy too. torch
    caches the pinned memory.
    """
    if outcome.watched is None:
        return None
    values = outcome.watched.values()
    on_gpu = values.device.type == "cuda"
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=on_gpu)
    return outcome.watched, host.copy_(values, non_blocking=on_gpu)


@dataclass(slots=True)
class Pending:
    """A record in transfer to the host, with the values that are already on the host.

    Keeps nothing on the device alive, except in a step that is watched or limits units.
    """

    key: object
    arrival: Arrival
    names: Sequence[str] | None
    parameter_names: Sequence[str] | None
    loss_names: Sequence[str]
    signal_names: tuple[str, ...]
    lr: float | None
    tag: Any
    is_joint: bool
    limit: float | None
    summaries: Sequence[UnitSummary]
    watched: tuple[Watched, Tensor] | None
    time: float

    @staticmethod
    def of(outcome: Outcome, arrival: Arrival, watched: tuple[Watched, Tensor] | None) -> Pending:
        """Returns the values of a step whose record is in transfer."""
        lr = None if outcome.lr_is_on_device else float(outcome.lr)
        return Pending(
            outcome.key,
            arrival,
            outcome.stats.names,
            outcome.parameter_names,
            outcome.signals.loss_names,
            outcome.signal_names,
            lr,
            outcome.tag,
            outcome.is_joint,
            None if outcome.limit_is_on_device else float(outcome.limit),
            outcome.verdict.clipped_units,
            watched,
            outcome.time,
        )

    @property
    def is_due(self) -> bool:
        """Whether the record should be made at once, because the step needs attention or the
        record keeps tensors alive. The row must have arrived."""
        keeps = self.watched is not None or self.summaries
        return bool(keeps or self.arrival.row.item(REASON))

    def record(self) -> StepRecord:
        """Returns the record. The row must have arrived."""
        # The names of other ranks' losses may be known only at this point.
        row = unpack(
            self.arrival.row, self.loss_names, self.is_joint, self.limit is None, self.summaries
        )
        culprits = [(name_in(self.names, i), n, p, m) for i, n, p, m in row.culprits]
        settled = Settled(
            self.key,
            row.known,
            self.signal_names,
            row.lr if self.lr is None else self.lr,
            self.tag,
            culprits,
            row.n_culprits,
            row.ranks,
            row.limit if self.limit is None else self.limit,
            _named(row.clipped_units, self.parameter_names),
            self.watched,
            self.time,
        )
        return settled.record()
