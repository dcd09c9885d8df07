"""`LossMeter`: means over the losses that are finite, and which ones were not.

    mean[name] = sum(w * loss) / sum(w)   over the batches whose w * loss is finite

Losses on a CPU are counted at once. On a GPU `update` only copies them, as float64, into the next
row of a buffer on the device; when its `ROWS` rows are full they travel to the host behind an
event, which is read when the next `ROWS` are full, so that nobody waits in practice. (Sums on the
device were tried: a dozen launches a batch instead of one a loss.) `compute` waits for what is on
its way.

An epoch without one valid batch has no mean: it is None, and the text says so. Memory does not grow
with the number of batches: the first `KEPT_BAD` bad ones are told one by one, and the tags of the
others are forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard.errors.checked_numbers import number_of, refuse_bool_and_text
from fastguard.errors.plain_text import printable
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.records.losses import LOSS, named_losses

KEPT_BAD = 16
"""How many bad batches are told one by one; the rest are counted."""

ROWS = 1024
"""Batches whose losses may wait on a GPU."""

_SUM, _WEIGHT, _FINITE, _NONFINITE = range(4)  # of the totals of a name


@dataclass(frozen=True, slots=True)
class BadBatch:
    """A batch in which a loss was not finite.

    Attributes:
        index: Number of the batch, from 0, since the last reset.
        names: The losses that were not finite.
        tag: What the caller gave to find the batch again.
        rank: The process that saw it.
    """

    index: int
    names: tuple[str, ...]
    tag: Any = None
    rank: int = 0

    def __str__(self) -> str:
        tag = "" if self.tag is None else f" (tag {self.tag})"
        return f"batch {self.index}{tag}: {', '.join(self.names)}"


@dataclass(frozen=True, slots=True)
class LossSummary:
    """What a `LossMeter` knows, as plain Python values.

    Attributes:
        means: Mean by name; None where no batch was valid.
        weights: Sum of the weights of the valid batches, by name.
        finite: How many batches were valid, by name.
        nonfinite: How many were not, by name.
        batches: How many batches there were.
        bad: The first bad batches.
    """

    means: dict[str, float | None]
    weights: dict[str, float]
    finite: dict[str, int]
    nonfinite: dict[str, int]
    batches: int
    bad: tuple[BadBatch, ...] = ()

    @property
    def mean(self) -> float | None:
        """The mean of the loss that was given without a name."""
        return self.means.get(LOSS)

    def __str__(self) -> str:
        """A line a loss, and one for the bad batches."""
        if not self.means:
            return "no loss was given"
        lines = [self._line(name) for name in self.means]
        if self.bad:
            lines.append("not finite in " + "; ".join(map(str, self.bad)))
        return "\n".join(map(printable, lines))

    def _line(self, name: str) -> str:
        mean, finite, nonfinite = self.means[name], self.finite[name], self.nonfinite[name]
        if mean is None:
            why = "all not finite" if nonfinite else "all of weight 0"
            return f"{name}: no valid batch ({finite + nonfinite} seen, {why})"
        bad = f", {nonfinite} not finite" if nonfinite else ""
        return f"{name}: {mean:.6g} (mean of {finite} batches{bad})"


class LossMeter:
    """Averages the losses that are finite, and tells how many were not and which.

    Example:
        >>> import torch, fastguard
        >>> meter = fastguard.LossMeter()
        >>> for batch, loss in enumerate([1.0, float("nan"), 3.0]):
        ...     meter.update(torch.tensor(loss), tag=("epoch 0", batch))
        >>> summary = meter.compute()
        >>> summary.mean, summary.nonfinite
        (2.0, {'loss': 1})
        >>> print(summary)
        loss: 2 (mean of 2 batches, 1 not finite)
        not finite in batch 1 (tag ('epoch 0', 1)): loss
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the next batch is batch 0."""
        self._totals: dict[str, list[float]] = {}
        self._bad: list[BadBatch] = []
        self._batches = 0
        self._waiting: _Waiting | None = None

    @torch._disable_dynamo
    def update(
        self,
        loss: Tensor | float | Mapping[str, Tensor | float],
        weight: Tensor | float = 1.0,
        tag: Any = None,
    ) -> None:
        """Adds the losses of one batch. Never waits for a GPU.

        Losses without numbers, under `FakeTensorMode` or on the meta device, leave no trace.

        Args:
            loss: A scalar, or a dict of scalars by name; names may be missing in some batches.
            weight: What the batch counts, >= 0: its number of samples, say.
            tag: Anything that helps to find the batch again.

        Raises:
            TypeError, ValueError: As in `GuardedOptimizer.step`, or `weight` is no number >= 0.
        """
        losses = named_losses(loss)
        batch = _Batch(self._batches, tuple(losses), tag)
        values = [*losses.values(), _checked_weight(weight)]
        if not all(has_numbers(v) for v in values if isinstance(v, Tensor)):
            return
        self._batches += 1
        device = _gpu_of(values)
        if device is None:
            self._count(batch, [v.item() if isinstance(v, Tensor) else v for v in values])
            return
        waiting = self._waiting
        if waiting is None or not waiting.fits(values, device):
            self._settle()
            waiting = self._waiting = _Waiting.fresh(len(values), device)
        waiting.add(batch, values)
        if waiting.is_full:
            self._count_all(waiting.arrived())
            waiting.send()

    def _count(self, batch: _Batch, values: Sequence[float]) -> None:
        *losses, weight = values
        bad = []
        for name, loss in zip(batch.names, losses, strict=True):
            totals = self._totals.setdefault(name, [0.0, 0.0, 0, 0])
            weighted = loss * weight
            if math.isfinite(weighted) and weight >= 0:  # 0 * Inf is not
                totals[_SUM] += weighted
                totals[_WEIGHT] += weight
                totals[_FINITE] += 1
            else:
                totals[_NONFINITE] += 1
                bad.append(name)
        if bad and len(self._bad) < KEPT_BAD:
            self._bad.append(BadBatch(batch.index, tuple(bad), batch.tag))

    def _count_all(self, rows: Iterable[tuple[_Batch, Sequence[float]]]) -> None:
        for batch, values in rows:
            self._count(batch, values)

    def _settle(self) -> None:
        """Counts what still waits on a GPU."""
        if self._waiting is not None:
            self._count_all(self._waiting.arrived())
            self._waiting.send()
            self._count_all(self._waiting.arrived())

    def compute(self) -> LossSummary:
        """The means and counts so far. Waits for the device."""
        return _summary([self.state_dict()])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> LossSummary:
        """The means and counts of all ranks of `group` together; the same on every rank. Waits.

        What this rank has gathered stays as it is, so calling it twice counts nothing twice. Ranks
        may have seen different names and different numbers of batches. Every rank must call it.
        """
        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group)
        return _summary(states)

    def state_dict(self) -> dict[str, Any]:
        """Everything so far, as plain Python values. Waits for the device."""
        self._settle()
        return {
            "totals": {name: list(totals) for name, totals in self._totals.items()},
            "bad": [(b.index, b.names, b.tag) for b in self._bad],
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict()`."""
        self.reset()
        self._totals = {name: list(totals) for name, totals in state["totals"].items()}
        self._bad = [BadBatch(index, tuple(names), tag) for index, names, tag in state["bad"]]
        self._batches = int(state["batches"])

    def __str__(self) -> str:
        """The summary. Waits for the device."""
        return str(self.compute())


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the host knows of a batch whose losses are still on the device."""

    index: int
    names: tuple[str, ...]
    tag: Any


@dataclass(slots=True)
class _Waiting:
    """Losses on a GPU that the host has not seen: float64 `(ROWS, width)`, one row a batch."""

    rows: Tensor
    batches: list[_Batch] = field(default_factory=list)
    travelling: tuple[Tensor, torch.cuda.Event | None, list[_Batch]] | None = None

    @staticmethod
    def fresh(width: int, device: torch.device) -> _Waiting:
        return _Waiting(torch.empty(ROWS, width, dtype=torch.float64, device=device))

    def fits(self, values: Sequence[Tensor | float], device: torch.device) -> bool:
        return self.rows.device == device and len(values) <= self.rows.shape[1]

    @property
    def is_full(self) -> bool:
        return len(self.batches) == ROWS

    @torch.no_grad()
    def add(self, batch: _Batch, values: Sequence[Tensor | float]) -> None:
        row = self.rows[len(self.batches)]
        for k, value in enumerate(values):
            if isinstance(value, Tensor):
                row[k].copy_(value, non_blocking=True)
            else:
                row[k].fill_(value)
        self.batches.append(batch)

    def send(self) -> None:
        """Starts the filled rows on their way to the host; the rows may then be used again."""
        filled, batches, self.batches = self.rows[: len(self.batches)], self.batches, []
        if not filled.is_cuda:
            self.travelling = (filled.to("cpu", copy=True), None, batches)
            return
        host = torch.empty(filled.shape, dtype=filled.dtype, pin_memory=True)
        host.copy_(filled, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(filled.device))  # not the current device's
        self.travelling = (host, event, batches)

    def arrived(self) -> Iterator[tuple[_Batch, Sequence[float]]]:
        """The rows that were sent last. Waits for them."""
        if self.travelling is None:
            return
        (host, event, batches), self.travelling = self.travelling, None
        if event is not None:
            event.synchronize()
        for batch, row in zip(batches, host.tolist(), strict=True):
            n = len(batch.names)
            yield batch, row[: n + 1]


def _summary(states: Sequence[Mapping[str, Any]]) -> LossSummary:
    """The summary of the states of all ranks, in rank order, so that all get the same bits."""
    totals: dict[str, list[float]] = {}
    bad: list[BadBatch] = []
    for rank, state in enumerate(states):
        for name, row in state["totals"].items():
            joint = totals.setdefault(name, [0.0] * 4)
            totals[name] = [a + b for a, b in zip(joint, row, strict=True)]
        bad += [BadBatch(index, tuple(names), tag, rank) for index, names, tag in state["bad"]]
    bad.sort(key=lambda b: (b.index, b.rank))
    return LossSummary(
        means={n: t[_SUM] / t[_WEIGHT] if t[_WEIGHT] else None for n, t in totals.items()},
        weights={n: t[_WEIGHT] for n, t in totals.items()},
        finite={n: int(t[_FINITE]) for n, t in totals.items()},
        nonfinite={n: int(t[_NONFINITE]) for n, t in totals.items()},
        batches=sum(int(state["batches"]) for state in states),
        bad=tuple(bad[:KEPT_BAD]),
    )


def _gpu_of(values: Iterable[Tensor | float]) -> torch.device | None:
    """Where the first value that is not on the host lives."""
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.device
    return None


def _checked_weight(weight: Tensor | float) -> Tensor | float:
    refuse_bool_and_text("weight", weight, "pass the number of samples, say")
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, but a batch has one; use its sum or mean"
            )
        return weight.detach().reshape(())
    weight = number_of("weight", weight, "pass the number of samples, say")
    if not 0 <= weight < math.inf:  # NaN is neither
        raise ValueError(f"weight={weight!r} must be a finite number >= 0")
    return weight
