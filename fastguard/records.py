"""What happened at each step, on the host: `StepRecord`.

A record is packed on the device into one small float64 vector, which travels to pinned memory
behind an event; nobody waits for it. On a CPU it is simply there. Reading it costs nothing until
then.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fastguard.decide import GuardState, Reason, Verdict
from fastguard.errors import NAMED_CULPRITS, Culprit, describe_culprits
from fastguard.measure import GradStats
from fastguard.reduce import Signals
from fastguard.strict_json import strict

log = logging.getLogger("fastguard")

KEPT = 4096
"""Records kept for `records()`; if nobody fetches them the oldest are dropped."""

_HEAD = 11  # numbers before the culprits in a packed record
_CULPRIT = 4  # index, NaN, +Inf, -Inf


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. All fields are plain Python values.

    Attributes:
        step: Number of the step, from 1, skipped ones counted.
        total_norm: Norm of the finite gradient elements before clipping.
        clip_coef: The smallest clip coefficient of all segments; 1 if nothing was clipped.
        action: `"applied"`, `"clipped"`, `"sanitized"` or `"skipped"`.
        reason: None, `"nonfinite_grad"`, `"nonfinite_loss"`, `"grad_spike"` or `"loss_spike"`; an
            applied step may have one, from a rule whose action is to record.
        nan, posinf, neginf: Elements of the whole model.
        culprits: `(name, nan, posinf, neginf)` of the first bad parameters.
        n_culprits: How many bad parameters there were.
        losses: Losses of the step by name.
        spikes: The signals that spiked.
        thresholds: What each rule compared its signal with; inf during its warm-up.
        consecutive_skips: Skipped steps in a row up to this one, 0 if it was applied.
        lr: Learning rate of the first param group.
        tag: What the caller gave to find the batch again.
    """

    step: int
    total_norm: float
    clip_coef: float
    action: str
    reason: str | None = None
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    culprits: tuple[Culprit, ...] = ()
    n_culprits: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    spikes: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    consecutive_skips: int = 0
    lr: float = math.nan
    tag: Any = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as values that strict JSON can hold.

        NaN and infinities are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float()`
        reads back; a tag that JSON cannot hold is its `str`.

        Example:
            >>> record = StepRecord(1, math.nan, 1.0, "skipped", culprits=(("head", 2, 0, 0),))
            >>> record.as_dict()["total_norm"], record.as_dict()["culprits"]
            ('NaN', [['head', 2, 0, 0]])
        """
        return {f.name: strict(getattr(self, f.name)) for f in fields(self)}

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"step {self.step} {self.action}"]
        if self.tag is not None:
            parts.append(f"(tag {' '.join(str(self.tag).split())})")
        if self.reason:
            parts.append(f"because of {self.reason}:")
        if self.culprits:
            parts.append(describe_culprits(self.culprits, self.n_culprits) + ";")
        bad_losses = {k: v for k, v in self.losses.items() if not math.isfinite(v)}
        if bad_losses:
            parts.append(", ".join(f"{k}={v}" for k, v in bad_losses.items()) + ";")
        for signal in self.spikes:
            value = self.losses.get(signal, self.total_norm)
            parts.append(f"{signal}={value:.4g} > {self.thresholds.get(signal, math.nan):.4g};")
        parts.append(
            f"norm {self.total_norm:.4g}, clip_coef {self.clip_coef:.4g}, lr {self.lr:.4g}"
        )
        if self.consecutive_skips > 1:
            parts.append(f"({self.consecutive_skips} skips in a row)")
        return " ".join(parts)


def record_now(
    stats: GradStats,
    signals: Signals,
    verdict: Verdict,
    state: GuardState,
    lr: Any,
    signal_names: Sequence[str],
    tag: Any,
) -> StepRecord:
    """The record of a step on a CPU, where everything is at hand."""
    coefs = verdict.clip_coef.tolist()
    nan, posinf, neginf = (int(sum(counts)) for counts in stats.summary.tolist()[1:])
    culprits = stats.culprits() if nan or posinf or neginf else []
    step, _, _, in_a_row = state.counters.tolist()
    coef = coefs[0] if len(coefs) == 1 else verdict.clip_coef.amin().item()
    spiked = verdict.spikes.tolist()
    return StepRecord(
        step=step,
        total_norm=verdict.total_norm.item(),
        clip_coef=coef,
        action=_action(coef, verdict.found_inf.item() > 0, verdict.clean.item() > 0),
        reason=Reason(verdict.reason.item()).label,
        nan=nan,
        posinf=posinf,
        neginf=neginf,
        culprits=tuple(culprits[:NAMED_CULPRITS]),
        n_culprits=len(culprits),
        losses=dict(zip(signals.loss_names, signals.losses.tolist(), strict=True)),
        spikes=tuple(s for s, hit in zip(signal_names, spiked, strict=True) if hit),
        thresholds=dict(zip(signal_names, verdict.thresholds.tolist(), strict=True)),
        consecutive_skips=in_a_row,
        lr=float(lr),
        tag=tag,
    )


def _action(coef: float, skipped: bool, cleaned: bool) -> str:
    if skipped:
        return "skipped"
    if cleaned:
        return "sanitized"
    return "applied" if coef >= 1.0 else "clipped"  # a NaN coefficient did change gradients


def pack(
    stats: GradStats, signals: Signals, verdict: Verdict, state: GuardState, lr: Any
) -> Tensor:
    """Everything a record needs from the device, in one float64 vector. Nothing waits for a GPU."""
    device = stats.summary.device
    table = _culprit_table(stats.counts)
    rate = torch.as_tensor(lr, dtype=torch.float64).to(device, non_blocking=True).reshape(1)
    head = torch.stack(
        [
            verdict.total_norm,
            verdict.clip_coef.amin(),
            verdict.found_inf.double(),
            verdict.clean.double(),
            verdict.reason.double(),
        ]
    )
    # fmt: off
    return torch.cat([
        head, state.counters[0::3].double(), stats.segment_counts.sum(1), rate,
        table, signals.losses, verdict.spikes.double(), verdict.thresholds,
    ])
    # fmt: on


def _culprit_table(counts: Tensor) -> Tensor:
    """`[how many, then (index, nan, posinf, neginf) of the first 8]`, float64, zeros if none."""
    k = min(NAMED_CULPRITS, counts.shape[1])
    table = torch.zeros(1 + NAMED_CULPRITS * _CULPRIT, dtype=torch.float64, device=counts.device)
    if counts.device.type == "cpu" and not counts.any():
        return table
    bad = counts.sum(0) > 0
    order = torch.arange(counts.shape[1], 0, -1, device=counts.device) * bad
    first = order.topk(k).indices
    table[0] = bad.sum()
    rows = torch.cat([first[None], counts[:, first] * bad[first]]).T
    table[1 : 1 + k * _CULPRIT] = rows.reshape(-1)
    return table


@dataclass(frozen=True, slots=True)
class _Pending:
    """A packed record on its way to the host, and what the host alone knows of that step."""

    values: Tensor
    arrived: torch.cuda.Event
    name_of: Callable[[int], str]
    loss_names: Sequence[str]
    signal_names: Sequence[str]
    tag: Any

    def unpack(self) -> StepRecord:
        values = self.values.tolist()
        norm, coef, skipped, cleaned, reason, step, in_a_row, nan, posinf, neginf, lr = values[
            :_HEAD
        ]
        n_culprits = int(values[_HEAD])
        at = _HEAD + 1
        culprits = []
        for k in range(min(n_culprits, NAMED_CULPRITS)):
            i, *counts = (int(v) for v in values[at + _CULPRIT * k : at + _CULPRIT * (k + 1)])
            culprits.append((self.name_of(i), *counts))
        at += _CULPRIT * NAMED_CULPRITS
        losses = dict(zip(self.loss_names, values[at:], strict=False))
        at += len(losses)
        n_rules = len(self.signal_names)
        spiked, thresholds = values[at : at + n_rules], values[at + n_rules :]
        return StepRecord(
            step=int(step),
            total_norm=norm,
            clip_coef=coef,
            action=_action(coef, bool(skipped), bool(cleaned)),
            reason=Reason(int(reason)).label,
            nan=int(nan),
            posinf=int(posinf),
            neginf=int(neginf),
            culprits=tuple(culprits),
            n_culprits=n_culprits,
            losses=losses,
            spikes=tuple(s for s, hit in zip(self.signal_names, spiked, strict=True) if hit),
            thresholds=dict(zip(self.signal_names, thresholds, strict=True)),
            consecutive_skips=int(in_a_row),
            lr=lr,
            tag=self.tag,
        )


class Recorder:
    """Collects the records of a run; every incident is one warning of the `fastguard` logger.

    Memory is bounded: `KEPT` finished records, and as many on their way as the device is behind.
    """

    def __init__(self) -> None:
        self.finished: deque[StepRecord] = deque(maxlen=KEPT)
        self.last: StepRecord | None = None
        self._pending: deque[_Pending] = deque()
        self.sinks: list[Callable[[StepRecord], object]] = []
        self._inboxes: list[deque[StepRecord]] = []
        self._undelivered: list[StepRecord] = []

    def __getstate__(self) -> dict[str, Any]:
        # Sinks and subscribers belong to the run, not to a copy of its optimizer.
        self.wait()
        return {"finished": self.finished, "last": self.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def add(
        self,
        stats: GradStats,
        signals: Signals,
        verdict: Verdict,
        state: GuardState,
        lr: Any,
        signal_names: Sequence[str],
        tag: Any,
    ) -> None:
        """Takes the results of a step. Never waits."""
        if stats.summary.device.type == "cpu":
            self._finish(record_now(stats, signals, verdict, state, lr, signal_names, tag))
            return
        packed = pack(stats, signals, verdict, state, lr)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append(
            _Pending(host, arrived, stats.name, signals.loss_names, signal_names, tag)
        )
        self.poll()

    def poll(self) -> None:
        """Finishes the records that have arrived. Never waits."""
        while self._pending:
            if not self._pending[0].arrived.query():
                return
            self._finish(self._pending.popleft().unpack())

    def wait(self) -> StepRecord | None:
        """Waits for the records of all steps so far; the last one."""
        while self._pending:
            self._pending[0].arrived.synchronize()
            self._finish(self._pending.popleft().unpack())
        return self.last

    def forget_last(self) -> None:
        """After loading a state, the last step of before says nothing about the next."""
        self.wait()
        self.last = None

    @property
    def has_subscribers(self) -> bool:
        """Whether anybody acts on the records of this run."""
        return bool(self._inboxes)

    def subscribe(self) -> deque[StepRecord]:
        """See `GuardedOptimizer.subscribe`."""
        inbox: deque[StepRecord] = deque()
        self._inboxes.append(inbox)
        return inbox

    def deliver(self) -> StepRecord | None:
        """Waits for the steps so far and fills the inboxes; the last record."""
        last = self.wait()
        for record in self._undelivered:
            for inbox in self._inboxes:
                inbox.append(record)
        self._undelivered.clear()
        return last

    def drain(self) -> list[StepRecord]:
        """The finished records since the last call, oldest first. Never waits."""
        self.poll()
        records = list(self.finished)
        self.finished.clear()
        return records

    def _finish(self, record: StepRecord) -> None:
        self.last = record
        self.finished.append(record)
        if self._inboxes:
            self._undelivered.append(record)
        if record.reason is not None:
            log.warning("%s", record)
        for sink in self.sinks:
            sink(record)
