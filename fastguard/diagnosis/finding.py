"""`Finding`: one observation of a check; and the order of importance of all kinds of findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastguard.errors.plain_text import printable

Severity = Literal["error", "warning", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "ok")
"""Severities from worst to best."""

CHECKS = (
    "initialization",
    "data",
    "forward",
    "loss",
    "backward",
    "precision",
    "optimizer",
    "real steps",
)
"""The families of checks, ordered by what breaks first."""

KINDS = (
    # Nothing can be learned.
    "empty-batch",
    "forward-raises",
    "shape-mismatch",
    "silent-broadcast",
    "loss-raises",
    "loss-shape",
    "loss-detached",
    "backward-raises",
    "foreign-optimizer",
    "lr-vanished",
    "activated-twice",
    "wrong-form",
    "wrong-axis",
    "swapped-arguments",
    "unaligned-targets",
    # Results are destroyed. Each kind can cause the kinds that follow.
    "nonfinite-weight",
    "negative-variance",
    "nonfinite-activation",
    "float16-range",
    "nonfinite-loss",
    "nonfinite-gradient",
    "all-gradients-zero",
    "no-gradient",
    "eps-vanished",
    "nonfinite-data",
    "index-out-of-range",
    "target-out-of-range",
    "diverges",
    # The model learns, but badly.
    "extreme-activation",
    "extreme-gain",
    "exploding-gradient",
    "vanishing-gradient",
    "zero-gradient",
    "saturated",
    "weight-decay",
    "momentum",
    "large-update",
    "small-update",
    "rounded-update",
    "does-not-fall",
    "not-optimized",
    "range",
    "constant-data",
    "one-label",
    "contradicting-labels",
    "duplicates",
    "sum-reduction",
    "loss-parts",
    "large-loss",
    "zero-weight",
    "constant-weight",
    "norm-eps",
    "float16-overflow",
    "float16-underflow",
    "precision-loss",
    "eps-dominates",
    "ignored-nonfinite",
    # Notes.
    "decayed-norms",
    "unprotected-buffers",
    "frozen",
    "resized-output",
    "eval-mode",
    "not-checked",
    "ok",
)
"""Every kind of finding, most important first."""
_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation of a check.

    Attributes:
        check: The family, one of `CHECKS`.
        kind: One of `KINDS`, which are ordered by importance.
        severity: `"error"`: the run cannot learn, or will be destroyed. `"warning"`: the run will
            learn worse than it could. `"note"`: an observation that is not a fault. `"ok"`: the
            family found no problems.
        seen: The observation, in words and numbers.
        where: The module, parameter, part of the batch or param group; empty for the whole model.
        value: The measured number, in the unit given in `seen`.
        limit: The limit for `value`; None if there is none.
        remedy: What to do about the problem.
    """

    check: str
    kind: str
    severity: Severity
    seen: str
    where: str = ""
    value: float = 0.0
    limit: float | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.check in CHECKS and self.kind in _RANK and self.severity in SEVERITIES
        # The texts contain names of modules, parameters and losses.
        for name in ("seen", "where", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        """Formats the finding on one to three lines."""
        where = f" in {self.where}" if self.where else ""
        if self.severity == "ok":
            return f"OK      {self.check}: {self.seen}"
        head = f"{self.severity.upper():<8}{self.check}: {self.kind}{where}"
        lines = [head, f"        {self.seen}"]
        return "\n".join([*lines, f"        Remedy: {self.remedy}"] if self.remedy else lines)


class Family(str):
    """The name of a family of checks; its methods create findings, see `Finding` for arguments."""

    def error(self, kind: str, seen: str, **more: Any) -> Finding:
        """Returns an error: the run cannot learn, or will fail."""
        return Finding(str(self), kind, "error", seen, **more)

    def warning(self, kind: str, seen: str, **more: Any) -> Finding:
        """Returns a warning: the run will learn worse than it could."""
        return Finding(str(self), kind, "warning", seen, **more)

    def note(self, kind: str, seen: str, **more: Any) -> Finding:
        """Returns a note: an observation that is not a fault."""
        return Finding(str(self), kind, "note", seen, **more)


def by_importance(finding: Finding) -> tuple[int, int, int]:
    """Returns the sort key of a finding: severity, then kind, then family."""
    return (
        SEVERITIES.index(finding.severity),
        _RANK[finding.kind],
        CHECKS.index(finding.check),
    )


def percent(share: float) -> str:
    """Formats a share with three digits: `0.25` becomes `25 %`."""
    return f"{100 * share:.3g} %"
