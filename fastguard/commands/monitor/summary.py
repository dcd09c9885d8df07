"""The output of `fastguard monitor --once`, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastguard.commands.monitor.run_state import RunState
from fastguard.commands.terminal import printable
from fastguard.records.step_record import StepRecord

LISTED = 10
"""Number of incidents listed in the text; the JSON lists all incidents that are kept."""

LOSSES, ACTIONS = 16, 8
"""Maximum number of losses and of actions listed by name; further ones are only counted."""

NAME = 80
"""Maximum length of a name in characters."""


def as_dict(path: Path, state: RunState, age: float | None) -> dict[str, Any]:
    """The state of a run as JSON values.

    Args:
        path: The file of records.
        state: The state of the run.
        age: Seconds since the last write, or None.
    """
    latest = state.latest
    return {
        "file": str(path),
        "run": None if state.header is None else asdict(state.header),
        "age_s": age,
        "latest": None if latest is None else latest.as_dict(),
        "records": state.in_window,
        "damaged_lines": state.damaged,
        "actions": dict(state.actions),
        "n_incidents": state.incidents_in_window,
        "reasons": dict(state.reasons),
        "layers": {"step": state.layers_step, "norms": state.layers} if state.layers else None,
        "incidents": [record.as_dict() for record in _in_window(state)],
    }


def as_text(path: Path, state: RunState, age: float | None) -> str:
    """The state of a run as a few lines of text."""
    lines = [f"{printable(str(path))}{named(state)}: {verdict(state)}"]
    if state.latest is not None:
        written = "" if age is None else f", written {duration(age)} ago"
        lines.append(position(state.latest) + written)
        lines.append(counts(state))
        lines += [layers(state)] if state.layers else []
    incidents = _in_window(state)[-LISTED:]
    if len(incidents) < state.incidents_in_window:
        lines.append(f"the last {len(incidents)} incidents:")
    lines += [f"  {printable(str(record))}" for record in incidents]
    return "\n".join(lines)


def _in_window(state: RunState) -> list[StepRecord]:
    kept = list(state.incidents)
    return kept[max(0, len(kept) - state.incidents_in_window) :]


def named(state: RunState) -> str:
    """The name of the run in parentheses; empty if it has none."""
    name = None if state.header is None else state.header.name
    return f" ({printable(name, NAME)})" if name else ""


def verdict(state: RunState) -> str:
    """The state of the run in one sentence."""
    if state.latest is None:
        return "no records yet"
    steps = "1 step" if state.in_window == 1 else f"{state.in_window:,} steps"
    found = state.incidents_in_window
    if not found:
        return f"no incident in the last {steps}"
    text = f"{found:,} incident{'s' * (found > 1)} in the last {steps}"
    in_a_row = state.latest.consecutive_skips
    if in_a_row:
        return f"{text}, skipping now ({in_a_row:,} in a row)"
    return f"{text}, the latest at step {state.incidents[-1].step:,}"


def position(record: StepRecord) -> str:
    """The latest step, norm, clip coefficient, learning rate and losses."""
    parts = [f"step {record.step:,}", f"norm {record.torch_norm:.4g}"]
    parts += [f"clip_coef {record.clip_coef:.4g}", f"lr {record.lr:.4g}"]
    losses = list(record.losses.items())
    parts += [f"{printable(name, NAME)} {value:.4g}" for name, value in losses[:LOSSES]]
    if len(losses) > LOSSES:
        parts.append(f"and {len(losses) - LOSSES} more losses")
    return ", ".join(parts)


def layers(state: RunState) -> str:
    """The layers with the largest gradient norms, at the latest step that recorded them."""
    norms = [f"{printable(name, NAME)} {norm:.4g}" for name, norm in state.layers.items()]
    return f"largest gradient norms at step {state.layers_step:,}: {', '.join(norms)}"


def counts(state: RunState) -> str:
    """Number of records per action, and of unreadable lines."""
    order = ("applied", "clipped", "sanitized", "skipped")
    names = [*(name for name in order if name in state.actions), *(state.actions.keys() - {*order})]
    parts = [f"{state.actions[name]:,} {printable(name, NAME)}" for name in names[:ACTIONS]]
    if len(names) > ACTIONS:
        parts.append(f"{len(names) - ACTIONS:,} other actions")
    if state.damaged:
        parts.append(f"{state.damaged:,} damaged line{'s' * (state.damaged > 1)}")
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
