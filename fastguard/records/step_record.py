"""What happened at one step, on the host: `StepRecord`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fastguard.errors import Culprit, describe_culprits
from fastguard.errors.plain_text import printable
from fastguard.records.strict_json import shortened, strict
from fastguard.stages.reason import Reason

LOSS_SCALE = Reason.LOSS_SCALE.label
"""The reason of a skip that is no incident."""

MOST_OF_A_TAG = 400
"""Characters of a tag in a line of the log."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. All fields are plain Python values.

    Attributes:
        step: Number of the step, from 1, skipped ones counted.
        total_norm: Norm of the finite gradient elements before clipping.
        clip_coef: The smallest clip coefficient of all segments; 1 if nothing was clipped.
        action: `"applied"`, `"clipped"`, `"sanitized"` or `"skipped"`.
        reason: None, `"nonfinite_grad"`, `"nonfinite_loss"`, `"grad_spike"`, `"loss_spike"`, or
            `"loss_scale"`: an overflow that only lowers the loss scale of a `GradScaler`. An
            applied step may have one, from a rule whose action is to record.
        nan, posinf, neginf: Elements of the whole model.
        culprits: `(name, nan, posinf, neginf)` of the first bad parameters.
        n_culprits: How many bad parameters there were.
        losses: Losses of the step by name.
        spikes: The signals that spiked.
        thresholds: What each rule compared its signal with; inf during its warm-up.
        consecutive_skips: Incidents skipped since the last applied step, 0 if this one was applied;
            a skip that only lowers a loss scale leaves it as it was.
        lr: Learning rate of the first param group.
        tag: What the caller gave to find the batch again.
        culprit_ranks: How many ranks held something non-finite; 0 in one process.
        culprit_rank: Which rank it was, if it was one; `culprits` are the parameters of this rank.
        limit: The norm of the whole model at which it would be clipped: `max_norm`, or what an
            adaptive rule made of it; of several segments, the norm where each is at its limit.
            `inf`: there was no limit.
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
    culprit_ranks: int = 0
    culprit_rank: int | None = None
    limit: float = math.inf

    @property
    def is_incident(self) -> bool:
        """Whether the step calls for a reaction: warning, back-off, skip budget, rollback.

        True for every skipped step and every step with a reason, except an overflow that only
        lowers a loss scale: a `GradScaler` searches for its scale that way in a healthy run.

        Example:
            >>> StepRecord(1, 2.0, 1.0, "skipped", "nonfinite_grad").is_incident
            True
            >>> StepRecord(1, 2.0, 1.0, "skipped", "loss_scale").is_incident
            False
        """
        if self.reason is None:
            return self.action == "skipped"  # a record that was written without its reason
        return self.reason != LOSS_SCALE

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as values that strict JSON can hold.

        NaN and infinities are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float()`
        reads back; a tag that JSON cannot hold is its `str`, and one that is very long, deep or
        cannot be shown is shortened: see `strict_json.shortened`.

        Example:
            >>> record = StepRecord(1, math.nan, 1.0, "skipped", culprits=(("head", 2, 0, 0),))
            >>> record.as_dict()["total_norm"], record.as_dict()["culprits"]
            ('NaN', [['head', 2, 0, 0]])
        """
        return {
            name: shortened(self.tag) if name == "tag" else strict(getattr(self, name))
            for name in FIELDS
        }

    def __str__(self) -> str:
        """One line for a log, printable whatever the names and the tag hold."""
        parts = [f"step {self.step} {self.action}"]
        if self.tag is not None:
            tag = " ".join(str(shortened(self.tag, room=MOST_OF_A_TAG)).split())
            parts.append(f"(tag {printable(tag, MOST_OF_A_TAG)})")
        if self.reason:
            parts.append(f"because of {self.reason}:")
        if self.culprits:
            parts.append(describe_culprits(self.culprits, self.n_culprits) + ";")
        elif self.nan or self.posinf or self.neginf:
            parts.append("parameters of another rank;")
        if self.culprit_rank is not None:
            parts.append(f"on rank {self.culprit_rank};")
        elif self.culprit_ranks:
            parts.append(f"on {self.culprit_ranks} ranks;")
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
        return printable(" ".join(parts))


FIELDS = tuple(f.name for f in fields(StepRecord))
"""Of a record, in order."""
