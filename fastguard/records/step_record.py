"""`StepRecord`: what happened in one step, as host values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from fastguard.errors import NAMED_CULPRITS, Culprit, describe_culprits
from fastguard.errors.plain_text import printable
from fastguard.records.strict_json import shortened, strict
from fastguard.stages.reason import Reason

LOSS_SCALE = Reason.LOSS_SCALE.label
"""The reason of a skip that only lowers a loss scale, which is not an incident."""

REPLICA_DRIFT = "replica_drift"
"""The reason of a step in which replicas differ; also the key of the result in `StepRecord.watch`.
"""

MAX_TAG_LENGTH = 400
"""Maximum number of characters of a tag in a log line."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one step. All fields are plain Python values.

    Attributes:
        step: Number of the step, from 1, including skipped steps.
        total_norm: Norm of the finite gradient elements before clipping.
        clip_coef: The smallest clip coefficient of all segments; 1 if nothing was clipped.
        action: `"applied"`, `"clipped"`, `"sanitized"` or `"skipped"`.
        reason: None, `"nonfinite_grad"`, `"nonfinite_loss"`, `"grad_spike"`, `"loss_spike"`, or
            `"loss_scale"` (an overflow that only lowers the loss scale of a `GradScaler`), or
            `"replica_drift"` (replicas that must be equal differ). An applied step can have a
            reason too: a rule with `action="record"`, or replica drift.
        nan, posinf, neginf: Numbers of NaN, +Inf and -Inf gradient elements in the whole model.
        culprits: `(name, nan, posinf, neginf)` of the first bad parameters.
        n_culprits: Number of bad parameters.
        losses: Losses of the step by name.
        spikes: The signals above their threshold: `"grad_norm"`, or the names of losses.
        thresholds: The threshold of each rule, by signal; inf during warm-up.
        consecutive_skips: Number of skipped steps since the last applied step, including this step.
            Steps that were skipped only to lower a loss scale do not count.
        lr: Learning rate of the first param group.
        tag: The value passed as `tag`, to find the batch again.
        culprit_ranks: Number of ranks with non-finite values; 0 in one process.
        culprit_rank: The rank with non-finite values, if there is only one; `culprits` are its
            parameters.
        limit: The total norm above which gradients are clipped: `max_norm`, or the limit set by an
            adaptive rule. With several segments, the total norm if all segments are at their
            limits. `inf`: no limit.
        clipped_units, limited_units: With `AGC`: number of units that were clipped, and of units
            with a limit; both are 0 in a skipped step.
        most_clipped_unit: The parameter and the number, from 0, of the unit with the smallest
            coefficient; None if no unit was clipped.
        watch: Results of `GuardedOptimizer(watch=...)`, by quantity; empty if the step was not
            watched. docs/watch.md describes each quantity.
        time: The time at which the host decided or enqueued the step, in Unix seconds; NaN if
            unknown. Comparisons of records ignore it.
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
    clipped_units: int = 0
    limited_units: int = 0
    most_clipped_unit: tuple[str, int] | None = None
    watch: dict[str, Any] = field(default_factory=dict)
    time: float = field(default=math.nan, compare=False)

    @property
    def is_incident(self) -> bool:
        """Whether the step calls for a reaction: a warning, a lower learning rate, or a rollback.

        True for every skipped step and every step with a reason, except an overflow that only
        lowers a loss scale, since a `GradScaler` finds its scale that way in healthy runs too.

        Example:
            >>> StepRecord(1, 2.0, 1.0, "skipped", "nonfinite_grad").is_incident
            True
            >>> StepRecord(1, 2.0, 1.0, "skipped", "loss_scale").is_incident
            False
        """
        if self.reason is None:
            return self.action == "skipped"  # a record from a file may lack its reason
        return self.reason != LOSS_SCALE

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as values that strict JSON can represent.

        NaN and infinities become the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which
        `float()` converts back. A tag that JSON cannot represent becomes its `str`; a very long or
        deeply nested tag is shortened, as by `strict_json.shortened`.

        Example:
            >>> record = StepRecord(1, math.nan, 1.0, "skipped", culprits=(("head", 2, 0, 0),))
            >>> record.as_dict()["total_norm"], record.as_dict()["culprits"]
            ('NaN', [['head', 2, 0, 0]])
        """
        return {
            name: shortened(self.tag) if name == "tag" else strict(getattr(self, name))
            for name in FIELDS
        }

    @property
    def torch_norm(self) -> float:
        """The norm as torch computes it: NaN if any element is NaN, else Inf if any is infinite.

        `total_norm` covers only the finite elements and is near 0 if most elements are not finite.
        Logs, loggers and plots therefore show this norm.

        Example:
            >>> StepRecord(1, 0.25, 1.0, "skipped", "nonfinite_grad", nan=3).torch_norm
            nan
        """
        if self.nan:
            return math.nan
        return math.inf if self.posinf or self.neginf else self.total_norm

    @property
    def because(self) -> str:
        """The reason as a phrase for messages; empty if there is no reason.

        Example:
            >>> StepRecord(1, 2.0, 1.0, "applied", "loss_spike").because
            'despite loss_spike (rule only records)'
        """
        if self.reason is None:
            return ""
        loss_let_through = self.reason == Reason.LOSS_SPIKE.label and self.action != "skipped"
        if loss_let_through or (self.reason.endswith("_spike") and self.action == "applied"):
            return f"despite {self.reason} (rule only records)"
        return f"because of {self.reason}"

    def __str__(self) -> str:
        """Formats one log line, printable for any names and tags."""
        head = [f"step {self.step} {self.action}"]
        if self.tag is not None:
            head.append(f"(tag {self._tag()})")
        if self.reason:
            head.append(f"{self.because}:")
        parts = [*head, *self._causes(NAMED_CULPRITS, math.inf)]
        parts.append(
            f"norm {self.torch_norm:.4g}, clip_coef {self.clip_coef:.4g}, lr {self.lr:.4g}"
        )
        if self.consecutive_skips > 1:
            parts.append(f"({self.consecutive_skips} skips in a row)")
        return printable(" ".join(parts))

    def line(self, limit: int) -> str:
        """Formats one log line of at most `limit` characters, with the most important parts.

        Example:
            >>> record = StepRecord(
            ...     7, 2.0, 1.0, "skipped", "nonfinite_grad", nan=3, lr=0.1, n_culprits=2,
            ...     culprits=(("head.weight", 2, 0, 0), ("head.bias", 1, 0, 0)), tag="shard 12",
            ... )
            >>> record.line(80)
            'step 7 skipped because of nonfinite_grad: head.weight (2 NaN) and 1 more; norm …'
        """
        full = str(self)
        if len(full) <= limit:
            return full
        parts = [f"step {self.step} {self.action}", *([f"{self.because}:"] if self.reason else ())]
        parts += [*self._causes(1, 2), f"norm {self.torch_norm:.4g}"]
        tag = "" if self.tag is None else f", tag {self._tag()}"
        return printable(" ".join(parts) + tag, limit)

    def _tag(self) -> str:
        tag = " ".join(str(shortened(self.tag, room=MAX_TAG_LENGTH)).split())
        return printable(tag, MAX_TAG_LENGTH)

    def _causes(self, n_culprits: int, n_losses: float) -> Iterator[str]:
        """Yields phrases that say what was not finite or above a threshold, and where."""
        if self.culprits:
            total = max(self.n_culprits, len(self.culprits))
            yield describe_culprits(self.culprits[:n_culprits], total) + ";"
        elif self.nan or self.posinf or self.neginf:
            yield "parameters of another rank;"
        if self.culprit_rank is not None:
            yield f"on rank {self.culprit_rank};"
        elif self.culprit_ranks:
            yield f"on {self.culprit_ranks} ranks;"
        for phrase in replica_drifts(self.watch):
            yield f"{phrase};"
        bad = [f"{k}={v}" for k, v in self.losses.items() if not math.isfinite(v)]
        if len(bad) > n_losses:
            bad[int(n_losses) :] = [f"{len(bad) - int(n_losses)} more losses"]
        if bad:
            yield ", ".join(bad) + ";"
        for signal in self.spikes:
            value = self.losses.get(signal, self.total_norm)
            yield f"{signal}={value:.4g} > {self.thresholds.get(signal, math.nan):.4g};"


def replica_drifts(watch: object) -> list[str]:
    """Returns phrases that say which replicas differ, and in what; ignores malformed values."""
    phrases = []
    suspects = watch.get(REPLICA_DRIFT) if isinstance(watch, dict) else None
    for what, ranks in suspects.items() if isinstance(suspects, dict) else ():
        if not isinstance(ranks, list):
            continue
        if len(ranks) == 1:
            phrases.append(f"the {what} of rank {ranks[0]} differ from the other ranks")
        elif ranks:
            phrases.append(f"the {what} of {len(ranks)} ranks differ")
    return phrases


FIELDS = tuple(f.name for f in fields(StepRecord))
"""Names of the fields, in order."""
