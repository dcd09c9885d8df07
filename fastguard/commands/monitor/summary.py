"""The output of `fastguard monitor --once`, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastguard.commands.monitor.watch import Watch
from fastguard.commands.terminal import printable
from fastguard.records.step_record import StepRecord

LISTED = 10
"""Number of incidents listed in the text; the JSON lists all that are kept."""

LOSSES, ACTIONS = 16, 8
"""Maximum number listed by name; the others are counted."""

NAME = 80
"""Maximum length of a name in characters."""


def as_dict(path: Path, watch: Watch, age: float | None) -> dict[str, Any]:
    """The state of a run as JSON values.

    Args:
        path: The file of records.
        watch: The state of the run.
        age: Seconds since the last write, or None.
    """
    latest = watch.latest
    return {
        "file": str(path),
        "run": None if watch.header is None else asdict(watch.header),
        "age_s": age,
        "latest": None if latest is None else latest.as_dict(),
        "records": watch.in_window,
        "damaged_lines": watch.damaged,
        "actions": dict(watch.actions),
        "n_incidents": watch.incidents_in_window,
        "reasons": dict(watch.reasons),
        "layers": {"step": watch.layers_step, "norms": watch.layers} if watch.layers else None,
        "incidents": [record.as_dict() for record in _in_window(watch)],
    }


def as_text(path: Path, watch: Watch, age: float | None) -> str:
    """The state of a run as a few lines of text."""
    lines = [f"{printable(str(path))}{named(watch)}: {verdict(watch)}"]
    if watch.latest is not None:
        written = "" if age is None else f", written {duration(age)} ago"
        lines.append(position(watch.latest) + written)
        lines.append(counts(watch))
        lines += [layers(watch)] if watch.layers else []
    incidents = _in_window(watch)[-LISTED:]
    if len(incidents) < watch.incidents_in_window:
        lines.append(f"the last {len(incidents)} incidents:")
    lines += [f"  {printable(str(record))}" for record in incidents]
    return "\n".join(lines)


def _in_window(watch: Watch) -> list[StepRecord]:
    kept = list(watch.incidents)
    return kept[max(0, len(kept) - watch.incidents_in_window) :]


def named(watch: Watch) -> str:
    """The name of the run in parentheses; empty if it has none."""
    name = None if watch.header is None else watch.header.name
    return f" ({printable(name, NAME)})" if name else ""


def verdict(watch: Watch) -> str:
    """The state of the run in one sentence."""
    if watch.latest is None:
        return "no records yet"
    steps = "1 step" if watch.in_window == 1 else f"{watch.in_window:,} steps"
    found = watch.incidents_in_window
    if not found:
        return f"no incident in the last {steps}"
    text = f"{found:,} incident{'s' * (found > 1)} in the last {steps}"
    in_a_row = watch.latest.consecutive_skips
    if in_a_row:
        return f"{text}, skipping now ({in_a_row:,} in a row)"
    return f"{text}, the latest at step {watch.incidents[-1].step:,}"


def position(record: StepRecord) -> str:
    """The latest step, norm, clip coefficient, learning rate and losses."""
    parts = [f"step {record.step:,}", f"norm {record.torch_norm:.4g}"]
    parts += [f"clip_coef {record.clip_coef:.4g}", f"lr {record.lr:.4g}"]
    losses = list(record.losses.items())
    parts += [f"{printable(name, NAME)} {value:.4g}" for name, value in losses[:LOSSES]]
    if len(losses) > LOSSES:
        parts.append(f"and {len(losses) - LOSSES} more losses")
    return ", ".join(parts)


def layers(watch: Watch) -> str:
    """The layers with the largest gradient norms, at the latest step that recorded them."""
    norms = [f"{printable(name, NAME)} {norm:.4g}" for name, norm in watch.layers.items()]
    return f"largest gradient norms at step {watch.layers_step:,}: {', '.join(norms)}"


def counts(watch: Watch) -> str:
    """Number of records per action, and of unreadable lines."""
    order = ("applied", "clipped", "sanitized", "skipped")
    names = [*(name for name in order if name in watch.actions), *(watch.actions.keys() - {*order})]
    parts = [f"{watch.actions[name]:,} {printable(name, NAME)}" for name in names[:ACTIONS]]
    if len(names) > ACTIONS:
        parts.append(f"{len(names) - ACTIONS:,} other actions")
    if watch.damaged:
        parts.append(f"{watch.damaged:,} damaged line{'s' * (watch.damaged > 1)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Formats seconds in the two most significant units."""
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
