"""Takes a few real steps on the batch: a model that can learn at all can overfit one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.checks.settings import check_settings
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding

CHECK = Family("real steps")


def check(evidence: Evidence) -> Iterator[Finding]:
    """Trains for a few steps if there is a finite loss."""
    evidence = evidence.repaired
    reason = evidence.no_steps_reason
    if reason:
        yield CHECK.note("not-checked", f"no steps were taken: {reason}")
        return
    seen = evidence.real_steps
    first, *after = seen.losses
    path = " -> ".join(f"{loss:.4g}" for loss in seen.losses)
    text = f"{len(after)} steps of {seen.optimizer} on this batch: loss {path}"
    if not all(map(math.isfinite, after)):
        yield CHECK.error(
            "diverges",
            f"{text}; the loss was finite at first, and then became NaN or Inf",
            value=next(i for i, loss in enumerate(after, 1) if not math.isfinite(loss)),
            remedy=_settings_to_fix(evidence)
            or "divide the learning rate by ten, add a warm-up, and clip gradients with "
            "GuardedOptimizer(max_norm=1.0).",
        )
    elif min(after) >= first:
        yield CHECK.warning(
            "does-not-fall",
            f"{text}; the loss does not fall",
            value=min(after),
            limit=first,
            remedy=_settings_to_fix(evidence)
            or "if the loss rises, the learning rate is too high. If the loss is flat, the "
            "learning rate is too low, or the gradients do not belong to this loss. The loss "
            "of a fully trained model may not fall either.",
        )
    else:
        yield Finding(CHECK, "ok", "ok", text, value=min(after), limit=first)


def _settings_to_fix(evidence: Evidence) -> str:
    """Returns a remedy if the optimizer has bad settings; otherwise an empty string."""
    found = [f for f in check_settings(evidence) if f.severity in ("error", "warning")]
    worst = [f for f in found if f.severity == "error"] or found
    return "fix the optimizer first: " + "; ".join(f.seen for f in worst) + "." if worst else ""
