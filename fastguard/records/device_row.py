"""The record of a step as one float64 row, for the transfer from a device to the host.

The values of a row, in order:

    total_norm, clip_coef, skipped, cleaned, reason, step, consecutive skips, NaN, +Inf, -Inf, lr,
    number of culprits, (index, NaN, +Inf, -Inf) of the first 8, L losses, K spikes, K thresholds,
    if several ranks decide together: for each of the L losses whether it was passed, the number of
        ranks with non-finite values, and the sum of their rank numbers
    with an adaptive limit: the limit of the whole model's norm
    with limits of units: the 4 values of `UnitSummary` for each bucket

Rows are stored in a ring on the device; each is copied to a ring in pinned memory, followed by an
event, without blocking.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.errors.checked_numbers import number_of
from fastguard.kernels.record_row import CULPRIT, CULPRITS, CULPRITS_BEGIN, CULPRITS_END, HEAD
from fastguard.kernels.record_row import N_CULPRITS as N_CULPRITS_AT
from fastguard.stages import backend
from fastguard.stages.agc import ClippedUnits, UnitSummary
from fastguard.stages.contract import GuardState, Known, Signals, Verdict
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason

ROWS = 64  # size of the ring; the device may lag this number of steps behind the host


class Watched(Protocol):
    """The quantities measured in a watched step; see `fastguard.guard.watch`."""

    def values(self) -> Tensor:
        """Returns the raw values, float64 `(n,)`, on the device of the stats."""
        ...

    def results(self, numbers: list[float], known: Known) -> dict[str, Any]:
        """Returns `StepRecord.watch`, computed from the raw values on the host."""
        ...


@dataclass(slots=True)  # not frozen: a frozen one takes three times as long to create
class Outcome:
    """A decided step, from which its record is made.

    Attributes:
        stats, signals, verdict, state: Results of the four stages; `state` is the state after the
            step.
        signal_names: The signal that each rule judges.
        lr: Learning rate of the first param group, a number or a tensor on the device of the stats.
        tag: The caller's tag, to find the batch again.
        limit: Limit of the whole model's norm, as in `Policy.joint_limit`.
        watched: The quantities measured in the step; None: the step is not watched.
        names: Name of each parameter of the optimizer, by position. None: the names of the stats,
            whose positions differ with flat buckets, which omit frozen parameters.
        time: The time at which the host decided or enqueued the step, in Unix seconds.
        key: A unique object that identifies the step.
    """

    stats: GradStats
    signals: Signals
    verdict: Verdict
    state: GuardState
    signal_names: tuple[str, ...] = ()
    lr: Any = float("nan")
    tag: Any = None
    limit: float | Tensor = math.inf
    watched: Watched | None = None
    names: Sequence[str] | None = None
    time: float = field(default_factory=time.time, init=False, compare=False)
    key: object = field(default_factory=object, init=False, compare=False, repr=False)

    @property
    def parameter_names(self) -> Sequence[str] | None:
        """Name of each parameter of the optimizer; None: messages use numbers."""
        return self.stats.names if self.names is None else self.names

    @property
    def width(self) -> int:
        """Number of values in the row of this step."""
        # torch implements `len` in Python, which is slower.
        n_losses, n_rules = self.signals.losses.numel(), self.verdict.thresholds.numel()
        of_ranks = n_losses + 2 if self.is_joint else 0
        of_units = 4 * len(self.verdict.clipped_units)
        return CULPRITS_END + n_losses + 2 * n_rules + of_ranks + self.limit_is_on_device + of_units

    @property
    def is_joint(self) -> bool:
        """Whether several ranks decided the step together."""
        return self.signals.given is not None and self.signals.bad_ranks is not None

    @property
    def lr_is_on_device(self) -> bool:
        """Whether the learning rate is a tensor on the device of the stats, unknown to the host."""
        return isinstance(self.lr, Tensor) and self.lr.device == self.stats.summary.device

    @property
    def limit_is_on_device(self) -> bool:
        """Whether an adaptive rule set the limit on the device; otherwise the host knows it."""
        return isinstance(self.limit, Tensor)


def learning_rate(groups: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
    """Returns the current learning rate of the first param group.

    Args:
        groups: `optimizer.param_groups`.
        device: The device that decides the step; a tensor there stays a tensor.

    Returns:
        A float or a tensor of one element. NaN if there is no number, because some optimizers have
        no learning rate, or one that is None, a string or a function.
    """
    lr = groups[0].get("lr") if groups else None
    if isinstance(lr, float):
        return lr
    if isinstance(lr, Tensor) and lr.device == device and device.type != "cpu":
        return lr if lr.numel() == 1 and not lr.is_complex() else math.nan
    try:
        return number_of("lr", lr)
    except Exception:  # an error in a foreign object must not fail the step
        return math.nan


def pack(outcome: Outcome, row: Tensor) -> None:
    """Writes the row of a step, float64 `(width,)`. Does not synchronize."""
    stats, signals = outcome.stats, outcome.signals
    for summary in reversed(outcome.verdict.clipped_units):
        row[-4:].copy_(summary.values)
        row = row[:-4]
    if isinstance(outcome.limit, Tensor):
        row[-1:].copy_(outcome.limit)
        row = row[:-1]
    if signals.given is not None and signals.bad_ranks is not None:
        of_ranks = torch.cat([signals.given.double(), signals.bad_ranks])
        row[-len(of_ranks) :] = of_ranks
        row = row[: -len(of_ranks)]
    lr = outcome.lr.double() if outcome.lr_is_on_device else None
    backend.stages(row.device).pack(row, stats, signals, outcome.verdict, outcome.state, lr)


class Row(NamedTuple):
    """An unpacked row, as plain Python values.

    Attributes:
        known: The decision.
        lr: Learning rate, if it was on the device.
        n_culprits: Number of bad tensors.
        culprits: `(index, NaN, +Inf, -Inf)` of the first `CULPRITS` bad tensors.
        ranks: Number of ranks with non-finite values, and the rank if there is only one.
        limit: Limit of the whole model's norm, if it was on the device.
        clipped_units: What the limits of units have clipped.
    """

    known: Known
    lr: float
    n_culprits: int
    culprits: list[tuple[int, int, int, int]]
    ranks: tuple[int, int | None]
    limit: float
    clipped_units: ClippedUnits


def unpack(
    row: np.ndarray,
    loss_names: Sequence[str],
    is_joint: bool = False,
    has_limit: bool = False,
    summaries: Sequence[UnitSummary] = (),
) -> Row:
    """Reads a row on the host.

    Args:
        row: float64 `(width,)`, see `pack`.
        loss_names: Names of its L losses; losses that no rank passed are left out.
        is_joint: Whether several ranks decided the step.
        has_limit: Whether the row contains the limit.
        summaries: The buckets of units whose values are at the end of the row.
    """
    values, n_losses = row.tolist(), len(loss_names)
    n_values = len(values) - 4 * len(summaries)
    values, of_units = values[:n_values], values[n_values:]
    limit = values.pop() if has_limit else math.inf
    given, n_ranks, rank = [True] * n_losses, 0, 0
    if is_joint:
        values, (*of_losses, ranks, rank) = values[: -n_losses - 2], values[-n_losses - 2 :]
        given, n_ranks = list(map(bool, of_losses)), int(ranks)
    norm, coef, skipped, cleaned, reason, step, in_a_row, nan, posinf, neginf, lr = values[:HEAD]
    n_culprits, at = int(values[N_CULPRITS_AT]), CULPRITS_BEGIN
    culprits = [
        tuple(map(int, values[at + CULPRIT * k : at + CULPRIT * (k + 1)]))
        for k in range(min(n_culprits, CULPRITS))
    ]
    at = CULPRITS_END
    losses, rules = values[at : at + n_losses], values[at + n_losses :]
    n_rules = len(rules) // 2
    known = Known(
        total_norm=norm,
        clip_coef=coef,
        skipped=bool(skipped),
        cleaned=bool(cleaned),
        changes_gradients=bool(cleaned) or coef != 1.0,
        reason=Reason(int(reason)),
        nonfinite_counts=(int(nan), int(posinf), int(neginf)),
        losses={loss_names[i]: loss for i, loss in enumerate(losses) if given[i]},
        spikes=list(map(bool, rules[:n_rules])),
        thresholds=rules[n_rules:],
        step=int(step),
        consecutive_skips=int(in_a_row),
    )
    one_rank = int(rank) if n_ranks == 1 else None
    clipped = ClippedUnits() if known.skipped else ClippedUnits.of(summaries, of_units)
    return Row(known, lr, n_culprits, culprits, (n_ranks, one_rank), limit, clipped)  # type: ignore[arg-type]


class Ring:
    """The rows of the last `ROWS` steps on a device, and their copies on the host.

    The memory is allocated once, so that steps allocate nothing. A row is reused after `ROWS`
    steps, and must have been read by then.
    """

    def __init__(self, device: torch.device, width: int) -> None:
        self.device: torch.device = device
        self.width: int = width
        on_gpu = device.type == "cuda"
        rows = torch.empty(ROWS, width, dtype=torch.float64, device=device)
        host = torch.empty(ROWS, width, dtype=torch.float64, device="cpu", pin_memory=on_gpu)
        # Views are created once, since each takes 2 µs.
        self._rows, self._host = rows.unbind(), host.unbind()
        self._numbers = [row.numpy() for row in self._host]
        self._events = [torch.cuda.Event() if on_gpu else None for _ in range(ROWS)]
        self._next = 0

    def send(self, outcome: Outcome) -> Arrival:
        """Packs a step and starts its transfer to the host. Never blocks."""
        k = self._next
        self._next = (k + 1) % ROWS
        row, host, width = self._rows[k], self._host[k], outcome.width
        numbers = self._numbers[k]
        if width < self.width:
            row, host, numbers = row[:width], host[:width], numbers[:width]
        pack(outcome, row)
        event = self._events[k]
        host.copy_(row, non_blocking=event is not None)
        if event is not None:
            # Uses the stream of the row's device, which need not be the current device.
            event.record(torch.cuda.current_stream(row.device))
        return Arrival(numbers, event)


@dataclass(slots=True)
class Arrival:
    """A row in transfer to the host, float64 `(width,)`."""

    row: np.ndarray
    event: torch.cuda.Event | None

    def has_arrived(self) -> bool:
        """Whether the row can be read."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Waits until the row can be read."""
        if self.event is not None:
            self.event.synchronize()
