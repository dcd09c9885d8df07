"""Records with one unusual value, for commands that read records from untrusted sources."""

from __future__ import annotations

from typing import Any

FIELDS = [
    "step", "total_norm", "clip_coef", "action", "reason", "nan", "culprits", "n_culprits",
    "losses", "spikes", "thresholds", "consecutive_skips", "lr", "tag", "culprit_ranks",
    "culprit_rank",
]  # fmt: skip


def good(step: int) -> dict[str, Any]:
    """A record of a good step, as JSON values."""
    row = {"step": step, "total_norm": 1.0, "clip_coef": 1.0, "action": "applied", "lr": 0.1}
    return {**row, "losses": {"loss": 1.0 + step}, "thresholds": {"loss": 9.0}}
