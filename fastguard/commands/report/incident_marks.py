"""The incidents of a report along the steps, by reason and action."""

from __future__ import annotations

import math
from functools import partial

import plotly.graph_objects as go

from fastguard.commands.report.style import ACTIONS, Row, label
from fastguard.commands.report.summary import Summary

_JUMP = "went back"


def incident_rows(summary: Summary) -> list[Row]:
    """The row of incidents and of places where the step number went back, if there are any."""
    if not (summary.table.incidents or summary.n_jumps):
        return []
    height = 10 + 26 * len(_event_labels(summary))
    return [Row("Incidents", height, partial(_add_events, summary))]


def _event_labels(summary: Summary) -> list[str]:
    reasons = sorted({label(name.partition("\n")[0], 60) for name in summary.events.names})
    return [*([_JUMP] if summary.n_jumps else []), *reversed(reasons)]


def _add_events(summary: Summary, figure: go.Figure, i: int) -> None:
    shown = set()
    for name in summary.events.names:
        what, _, done = name.partition("\n")
        reason, action = label(what, 60), label(done, 60)
        x, size, text = [], [], []
        for _, count, first in summary.events.items(name):
            x.append(first)
            size.append(min(18.0, 7 + 2 * math.log2(count)))
            more = f" and {count - 1:,} more near it" if count > 1 else ""
            text.append(f"step {first:,}{more}: {reason} {action}")
        figure.add_scatter(
            x=x,
            y=[reason] * len(x),
            row=i,
            col=1,
            mode="markers",
            name=action,
            legendgroup=f"action {action}",
            showlegend=action not in shown,
            marker={
                "color": ACTIONS.get(action, "#8b8b8b"),
                "size": size,
                "opacity": 0.85,
                "line": {"width": 0},
            },
            text=text,
            hovertemplate="%{text}<extra></extra>",
        )
        shown.add(action)
    if summary.n_jumps:
        figure.add_scatter(
            x=[jump.from_step for jump in summary.jumps],
            y=[_JUMP] * len(summary.jumps),
            row=i,
            col=1,
            mode="markers",
            name=_JUMP,
            showlegend=False,
            marker={"color": "#b279d6", "size": 10, "symbol": "triangle-left"},
            text=[f"from step {j.from_step:,} to {j.to_step:,}" for j in summary.jumps],
            hovertemplate="%{text}<extra></extra>",
        )
    labels = _event_labels(summary)
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=labels,
        range=[-0.5, len(labels) - 0.5],
        row=i,
        col=1,
    )
