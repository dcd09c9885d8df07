"""`LossMeter`: averages finite losses and reports non-finite ones.

    mean[name] = sum(w * loss) / sum(w)   over the batches whose w * loss is finite

Losses on a CPU are counted immediately. Losses on a GPU are copied, as float64, into the next row
of a buffer on the device. When its `ROWS` rows are full, they are copied to the host
asynchronously; the host reads them when the next `ROWS` rows are full, so it almost never blocks.
(The alternative, sums on the device, takes a dozen launches per batch instead of one per loss.)
`compute` synchronizes.

If no batch is valid, the mean is None, and the printed summary says so. Memory does not grow with
the number of batches: only the first `KEPT_BAD` bad batches are listed.
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
"""Number of bad batches that are listed; further ones are only counted."""

ROWS = 1024
"""Number of batches that may wait on a GPU."""

_SUM, _WEIGHT, _FINITE, _NONFINITE = range(4)  # columns of the totals per name


@dataclass(frozen=True, slots=True)
class BadBatch:
    """A batch with a non-finite loss.

    Attributes:
        index: Number of the batch since the last reset, from 0.
        names: The losses that were not finite.
        tag: The caller's tag, to find the batch again.
        rank: The rank on which the loss was non-finite.
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
    """The result of a `LossMeter`, as plain Python values.

    Attributes:
        means: Mean by name; None if no batch was valid.
        weights: Sum of the weights of the valid batches, by name.
        finite: Number of valid batches, by name.
        nonfinite: Number of batches with a non-finite loss, by name.
        batches: Total number of batches.
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
        """The mean of the loss that was passed without a name."""
        return self.means.get(LOSS)

    def __str__(self) -> str:
        """Formats one line per loss, and one for the bad batches."""
        if not self.means:
            return "no loss was passed"
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
    """Averages finite losses, and reports the number and the names of non-finite losses.

    Example:
        >>> import torch, fastguard
        >>> meter = fastguard.LossMeter()
        >>> for batch, loss in enumerate([1.0, float("nan"), 3.0]):
        ...     meter.update(torch.tensor(loss), tag=("epoch 0", batch))
        >>> summary = meter.compute()
        >>> summary.mean, summary.nonfinite
        (2.0, {'loss': 1})
        >>> print(summary)
        loss: 2 (mean of 2 batches, 1 not finite) not finite in batch 1 (tag ('epoch 0', 1)): loss
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clears everything; the next batch is batch 0."""
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
        """Adds the losses of one batch. Never synchronizes with the GPU.

        Losses without values, under `FakeTensorMode` or on the meta device, are ignored.

        Args:
            loss: A scalar, or a dict of scalars by name; the names may differ between batches.
            weight: Weight of the batch, >= 0, such as its number of samples. Default: 1.
            tag: Any value that identifies the batch. Default: None.

        Raises:
            TypeError, ValueError: The loss is invalid as in `GuardedOptimizer.step`, or `weight` is
                not a number >= 0.
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
            if math.isfinite(weighted) and weight >= 0:  # 0 * Inf is not finite
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
        """Counts the losses that are still on a GPU. Synchronizes."""
        if self._waiting is not None:
            self._count_all(self._waiting.arrived())
            self._waiting.send()
            self._count_all(self._waiting.arrived())

    def compute(self) -> LossSummary:
        """Returns the means and counts so far. Synchronizes with the device."""
        return _summary([self.state_dict()])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> LossSummary:
        """Returns the means and counts over all ranks of `group`. Synchronizes.

        Every rank must call this method, and all ranks get the same result. Ranks may have
        different names and different numbers of batches. The state of the meter does not change, so
        that repeated calls count nothing twice.

        Args:
            group: The ranks; None: all ranks.
        """
        states: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self.state_dict(), group)
        return _summary(states)

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain Python values. Synchronizes with the device."""
        self._settle()
        return {
            "totals": {name: list(totals) for name, totals in self._totals.items()},
            "bad": [(b.index, b.names, b.tag) for b in self._bad],
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict()`."""
        self.reset()
        self._totals = {name: list(totals) for name, totals in state["totals"].items()}
        self._bad = [BadBatch(index, tuple(names), tag) for index, names, tag in state["bad"]]
        self._batches = int(state["batches"])

    def __str__(self) -> str:
        """Formats the summary. Synchronizes with the device."""
        return str(self.compute())


@dataclass(frozen=True, slots=True)
class _Batch:
    """The host's data of a batch whose losses are still on the device."""

    index: int
    names: tuple[str, ...]
    tag: Any


@dataclass(slots=True)
class _Waiting:
    """Losses on a GPU that the host has not read yet.

    Attributes:
        rows: float64 `(ROWS, width)`, one row per batch: its losses and its weight.
        batches: The batches of the filled rows.
        traveling: The rows in transfer to the host, the event that ends the transfer, and the
            batches of these rows.
    """

    rows: Tensor
    batches: list[_Batch] = field(default_factory=list)
    traveling: tuple[Tensor, torch.cuda.Event | None, list[_Batch]] | None = None

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
        """Starts copying the filled rows to the host; the rows may then be reused."""
        filled, batches, self.batches = self.rows[: len(self.batches)], self.batches, []
        if not filled.is_cuda:
            self.traveling = (filled.to("cpu", copy=True), None, batches)
            return
        host = torch.empty(filled.shape, dtype=filled.dtype, device="cpu", pin_memory=True)
        host.copy_(filled, non_blocking=True)
        event = torch.cuda.Event()
        # Uses the stream of the losses' device, which need not be the current device.
        event.record(torch.cuda.current_stream(filled.device))
        self.traveling = (host, event, batches)

    def arrived(self) -> Iterator[tuple[_Batch, Sequence[float]]]:
        """Waits for the rows that were sent last, and yields them."""
        if self.traveling is None:
            return
        (host, event, batches), self.traveling = self.traveling, None
        if event is not None:
            event.synchronize()
        for batch, row in zip(batches, host.tolist(), strict=True):
            n = len(batch.names)
            yield batch, row[: n + 1]


def _summary(states: Sequence[Mapping[str, Any]]) -> LossSummary:
    """Combines the states of all ranks in rank order, so that all get bitwise equal results."""
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
    """Returns the device of the first value that is not on the CPU; None if there is none."""
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.device
    return None


def _checked_weight(weight: Tensor | float) -> Tensor | float:
    refuse_bool_and_text("weight", weight, "pass a number, such as the number of samples")
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected a single number; use its sum or "
                "mean"
            )
        return weight.detach().reshape(())
    weight = number_of("weight", weight, "pass a number, such as the number of samples")
    if not 0 <= weight < math.inf:  # this form of the comparison also rejects NaN
        raise ValueError(f"weight={weight!r} must be a finite number >= 0")
    return weight
