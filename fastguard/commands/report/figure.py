"""The plots of a report: one figure with stacked rows that share a step axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fastguard.commands.report.culprit_map import culprit_rows
from fastguard.commands.report.curves import add_marks, curve_rows
from fastguard.commands.report.incident_marks import incident_rows
from fastguard.commands.report.style import COLORS, Row, label
from fastguard.commands.report.summary import Summary
from fastguard.commands.report.watched_maps import watched_rows

_PHONE = 250  # plot width in pixels
_HEAD, _LEGEND_LINE = 34, 20  # pixels above a plot, for its title and for each line of legend
_GRID = "rgba(128,128,128,0.22)"
_AXIS = {"gridcolor": _GRID, "linecolor": _GRID, "zeroline": False}
_LEGEND = {
    "x": 1,
    "xanchor": "right",
    "yanchor": "bottom",
    "orientation": "h",
    "bgcolor": "rgba(0,0,0,0)",
    "font": {"size": 11},
}


def draw(summary: Summary) -> go.Figure:
    """Draws the figure of a run, omitting rows without data."""
    rows = [
        *curve_rows(summary),
        *incident_rows(summary),
        *culprit_rows(summary),
        *watched_rows(summary),
    ]
    if not rows:
        return go.Figure()
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0)
    for i, row in enumerate(rows, 1):
        row.draw(figure, i)
    _lay_out(figure, summary, rows)
    add_marks(figure, summary, rows)
    # The page's script reads this entry.
    figure.layout.meta = {
        "bucket": 2**summary.shift,
        "names": {
            f"yaxis{i if i > 1 else ''}": {
                kind: [label(layer, n) for layer in row.layers]
                for kind, n in (("short", 15), ("long", 24))
            }
            for i, row in enumerate(rows, 1)
            if row.layers
        },
        "clock": None if summary.clock is None else summary.clock.as_dict(),
    }
    return figure


def _lay_out(figure: go.Figure, summary: Summary, rows: Sequence[Row]) -> None:
    """Positions the rows, each below its title and legend, in pixels."""
    heads = [_HEAD + _LEGEND_LINE * _legend_lines(figure, row, i) for i, row in enumerate(rows, 1)]
    total = sum(heads) + sum(row.height for row in rows)
    top = total
    for i, (row, head) in enumerate(zip(rows, heads, strict=True), 1):
        top -= head
        suffix = str(i) if i > 1 else ""
        figure.layout[f"yaxis{suffix}"].domain = [max(0.0, (top - row.height) / total), top / total]
        figure.update_traces(legend=f"legend{suffix}", row=i, col=1, selector={"type": "scatter"})
        figure.layout[f"legend{suffix}"] = {**_LEGEND, "y": top / total}
        figure.add_annotation(
            text=f"<b>{row.title}</b>",
            x=0,
            y=1,
            xref="paper",
            yref=f"y{suffix} domain",
            xanchor="left",
            yanchor="bottom",
            yshift=head - _HEAD + 4,
            showarrow=False,
            font_size=13,
        )
        top -= row.height
    span = max(1, summary.last_step - summary.first_step)
    figure.update_xaxes(
        **_AXIS, range=[summary.first_step - 0.01 * span, summary.last_step + 0.01 * span]
    )
    figure.update_xaxes(title_text="step", tickformat=",", row=len(rows), col=1)
    figure.update_yaxes(**_AXIS, automargin=True)
    figure.update_layout(
        template="none",
        height=total + 76,
        margin={"l": 8, "r": 12, "t": 36, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8b8b8b", "activecolor": COLORS[0]},
    )


def _legend_lines(figure: go.Figure, row: Row, i: int) -> int:
    """Legend lines between title and plot on a phone; 0 if the legend fits beside the title."""
    traces = figure.select_traces(row=i, col=1, selector={"type": "scatter"})
    width = sum(42 + 6.5 * len(trace.name) for trace in traces if trace.showlegend)
    if width + 8 * len(row.title) <= _PHONE:
        return 0
    return math.ceil(width / _PHONE)
