"""A few real steps on the batch: a model that can learn at all learns one batch by heart."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.checks.settings import check_settings
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Finding

CHECK = "real steps"


def check(evidence: Evidence) -> Iterator[Finding]:
    """Trains for some steps, if there is a finite loss to go down."""
    evidence = evidence.repaired
    reason = evidence.no_steps
    if reason:
        yield Finding(CHECK, "not-checked", "note", f"no steps were taken: {reason}")
        return
    seen = evidence.real_steps
    first, *after = seen.losses
    told = f"{len(after)} steps of {seen.optimizer} on this batch: loss {_path(seen.losses)}"
    if not all(map(math.isfinite, after)):
        yield Finding(
            CHECK,
            "diverges",
            "error",
            f"{told}; it was finite, and the steps destroyed it",
            value=next(i for i, loss in enumerate(after, 1) if not math.isfinite(loss)),
            remedy=_blamed(evidence)
            or "lower the learning rate by ten, warm it up, and clip: "
            "GuardedOptimizer(max_norm=1.0).",
        )
    elif min(after) >= first:
        yield Finding(
            CHECK,
            "does-not-fall",
            "warning",
            f"{told}; it does not fall",
            value=min(after),
            limit=first,
            remedy=_blamed(evidence)
            or "if it rises, the learning rate is too high; if it stays, it is too low or the "
            "gradients do not belong to this loss. A model that is done learning may do so too.",
        )
    else:
        yield Finding(CHECK, "ok", "ok", told, value=min(after), limit=first)


def _blamed(evidence: Evidence) -> str:
    """What to mend first, where a setting of the optimizer explains what the steps did."""
    found = [f for f in check_settings(evidence) if f.severity in ("error", "warning")]
    worst = [f for f in found if f.severity == "error"] or found
    return "mend the optimizer first: " + "; ".join(f.seen for f in worst) + "." if worst else ""


def _path(losses: list[float]) -> str:
    return " -> ".join(f"{loss:.4g}" for loss in losses)
