"""The plots of a report: one figure with stacked rows that share a step axis.

Every line passes through the minimum and maximum of each bucket, at the steps where they occurred,
and through every step around an incident: all points are measured and no extreme is lost. If a
bucket holds more than one step, its mean is drawn on top.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fastguard.commands.report.columns import COEF, LIMIT, LR, NORM, Series
from fastguard.commands.report.summary import Summary
from fastguard.commands.report.tally import Tally
from fastguard.errors.plain_text import printable

COLORS = (
    "#4c8dff", "#f58518", "#2ca58d", "#b279d6", "#d4a72c", "#e377a2", "#7f8fa6", "#8c6d31",
)  # fmt: skip
ACTIONS = {
    "skipped": "#e5484d",
    "sanitized": "#f58518",
    "clipped": "#4c8dff",
    "applied": "#8b8b8b",
}
"""The color of each action taken at a bad step."""

_JUMP = "went back"
_ROW_HEIGHT = 170
_MOST_LAYERS = 40
_OVERLAYS = 20  # the marks of row i use axis i + this offset
_HEAT_COLUMNS = 96
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
_WIDE_RANGE = 50.0  # max/min ratio from which an axis is logarithmic


@dataclass(frozen=True, slots=True)
class _Line:
    series: Series
    label: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True, slots=True)
class _Row:
    title: str
    height: float
    lines: tuple[_Line, ...] = ()


def draw(summary: Summary) -> go.Figure:
    """Draws the figure of a run, without rows that have no data."""
    rows = _line_rows(summary)
    if summary.table.incidents or summary.n_jumps:
        rows.append(_Row("Incidents", 10 + 26 * len(_event_labels(summary))))
    layers = _drawn_layers(summary.layers)
    if layers:
        rows.append(_Row("Non-finite gradients by layer", 10 + 18 * len(layers)))
    if not rows:
        return go.Figure()
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0)
    for i, row in enumerate(rows, 1):
        if row.lines:
            _add_lines(figure, summary, row, i)
        elif row.title == "Incidents":
            _add_events(figure, summary, i)
        else:
            _add_heat_map(figure, summary, layers, i)
    _lay_out(figure, summary, rows)
    _add_marks(figure, summary, rows)
    suffix = len(rows) if len(rows) > 1 else ""
    names = {
        kind: [_label(layer, n) for layer in layers] for kind, n in (("short", 15), ("long", 24))
    }
    # Read by the page's script.
    figure.layout.meta = {
        "bucket": 2**summary.shift,
        "names": {f"yaxis{suffix}": names} if layers else {},
    }
    return figure


def _line_rows(summary: Summary) -> list[_Row]:
    found = list(summary.curves)
    losses = [s for s in found if s.kind == "loss"]
    color = {s.name: COLORS[i % len(COLORS)] for i, s in enumerate(losses)}
    loss_lines = [_Line(s, s.name, color[s.name]) for s in losses]
    norm_lines = [
        _Line(NORM, "gradient norm", COLORS[0]),
        _Line(LIMIT, "limit", COLORS[2], "dot"),
    ]
    for s in found:
        if s.kind != "threshold":
            continue
        if s.name in color:
            loss_lines.append(_Line(s, f"threshold of {s.name}", color[s.name], "dot"))
        else:
            norm_lines.append(_Line(s, "threshold", ACTIONS["skipped"], "dot"))
    rows = [
        _Row("Loss", 1.3 * _ROW_HEIGHT, tuple(loss_lines)),
        _Row("Gradient norm", 1.3 * _ROW_HEIGHT, tuple(norm_lines)),
        _Row("Clip coefficient", 0.7 * _ROW_HEIGHT, (_Line(COEF, "clip coefficient", COLORS[2]),)),
        _Row("Learning rate", 0.7 * _ROW_HEIGHT, (_Line(LR, "learning rate", COLORS[3]),)),
    ]
    return [row for row in rows if any(line.series in found for line in row.lines)]


def _add_lines(figure: go.Figure, summary: Summary, row: _Row, i: int) -> None:
    logarithmic = _is_wide(summary, row)
    solid = [line for line in row.lines if line.dash == "solid" and line.series in summary.curves]
    for n, line in enumerate(row.lines):
        curve = summary.curves.get(line.series)
        if curve is None:
            continue
        x, y = curve.x, curve.y
        if logarithmic:
            y = np.where(y > 0, y, np.nan)  # a logarithmic axis cannot show 0
        if not np.isfinite(y).any():
            continue
        named = len(solid) > 1 or line.label.lower() != row.title.lower()
        coarse = summary.shift > 0 and line.dash == "solid"
        common = {
            "name": _label(line.label, 30),
            "legendgroup": f"{i} {n}",
            "mode": "lines" if len(x) > 1 else "markers",
            "hovertemplate": "step %{x:,}: %{y:.6~g}<extra>%{fullData.name}</extra>",
        }
        figure.add_scatter(
            x=x,
            y=y,
            row=i,
            col=1,
            line={"color": line.color, "width": 1 if coarse else 1.4, "dash": line.dash},
            opacity=0.4 if coarse else 1.0,
            meta="extremes" if coarse else "steps" if line.dash == "solid" else None,
            showlegend=named and not coarse,
            **common,
        )
        if coarse:
            figure.add_scatter(
                x=curve.middle,
                y=curve.mean,
                row=i,
                col=1,
                line={"color": line.color, "width": 1.8},
                showlegend=named,
                meta="mean",
                **{**common, "hovertemplate": "mean " + common["hovertemplate"]},
            )
    figure.update_yaxes(exponentformat="power", row=i, col=1)
    if logarithmic:
        figure.update_yaxes(type="log", dtick=1, tickformat="~g", row=i, col=1)
    elif (shown := _range(summary, row)) is not None:
        figure.update_yaxes(range=shown, row=i, col=1)


def _is_wide(summary: Summary, row: _Row) -> bool:
    """Whether a row needs a logarithmic axis and its values allow one."""
    values = _drawn_values(summary, row)
    if row.title == "Gradient norm":
        values = values[values > 0]
    elif row.title != "Loss":
        return False
    return bool(len(values) and values.min() > 0 and values.max() > _WIDE_RANGE * values.min())


def _drawn_values(summary: Summary, row: _Row) -> np.ndarray:
    drawn = [summary.curves[line.series].y for line in row.lines if line.series in summary.curves]
    values = np.concatenate(drawn)
    return values[np.isfinite(values)]


def _range(summary: Summary, row: _Row) -> list[float] | None:
    """The axis range of a row with nearly constant values; None to fit the data.

    Around a constant, Plotly would show ±1, which is a thousand learning rates.
    """
    if row.title == "Clip coefficient":
        return [0.0, 1.05]
    values = _drawn_values(summary, row)
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return None
    return [-1.0, 1.0] if low == 0 else sorted((0.0, 1.5 * low))


def _add_marks(figure: go.Figure, summary: Summary, rows: Sequence[_Row]) -> None:
    """Draws a triangle above every curve at each bad step, on an axis that does not zoom."""
    steps: dict[str, list[int]] = {}
    for name in summary.events.names:
        action = name.partition("\n")[2]
        steps.setdefault(action, []).extend(first for _, _, first in summary.events.items(name))
    for i, row in enumerate(rows, 1):
        if not row.lines:
            continue
        suffix, overlay = (str(i) if i > 1 else ""), f"y{_OVERLAYS + i}"
        figure.layout[f"yaxis{_OVERLAYS + i}"] = {
            "overlaying": f"y{suffix}",
            "range": [0, 1],
            "fixedrange": True,
            "visible": False,
        }
        for action, x in steps.items():
            figure.add_trace(
                go.Scatter(
                    x=sorted(set(x)),
                    y=[0.97] * len(set(x)),
                    xaxis=f"x{suffix}",
                    yaxis=overlay,
                    mode="markers",
                    name="mark",
                    text=_label(action, 60),
                    showlegend=False,
                    meta="mark",
                    marker={
                        "symbol": "triangle-down",
                        "size": 8,
                        "color": ACTIONS.get(action, "#8b8b8b"),
                    },
                    hovertemplate="step %{x:,}: %{text}<extra></extra>",
                )
            )


def _event_labels(summary: Summary) -> list[str]:
    reasons = sorted({_label(name.partition("\n")[0], 60) for name in summary.events.names})
    return [*([_JUMP] if summary.n_jumps else []), *reversed(reasons)]


def _add_events(figure: go.Figure, summary: Summary, i: int) -> None:
    shown = set()
    for name in summary.events.names:
        what, _, done = name.partition("\n")
        reason, action = _label(what, 60), _label(done, 60)
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


def _drawn_layers(layers: Tally) -> list[str]:
    """The layers with the most bad steps, sorted by name in natural order."""
    most = sorted(layers.names, key=layers.total, reverse=True)[:_MOST_LAYERS]
    return sorted(most, key=_natural)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _add_heat_map(figure: go.Figure, summary: Summary, layers: Sequence[str], i: int) -> None:
    first, last = summary.first_step, summary.last_step
    # One step in ten thousand would be too thin to see: draw wide cells, with a thin mark in each
    # at its first bad step.
    bits = max(summary.layers.shift, ((last - first) // _HEAT_COLUMNS).bit_length())
    counts = np.full((len(layers), (last >> bits) - (first >> bits) + 1), np.nan)
    marks = []
    for row, layer in enumerate(layers):
        for key, count, step in summary.layers.items(layer):
            column = (key >> (bits - summary.layers.shift)) - (first >> bits)
            counts[row, column] = np.nansum([counts[row, column], count])
            marks.append((step, row))
    columns = np.arange(counts.shape[1]) + (first >> bits)
    names = [_label(layer, 400) for layer in layers]
    figure.add_heatmap(
        x=columns * (1 << bits) + ((1 << bits) - 1) / 2,
        y=list(range(len(layers))),
        z=counts,
        dx=1 << bits,
        customdata=[[name] * len(columns) for name in names],
        row=i,
        col=1,
        colorscale=[[0, "#f3b27a"], [0.5, "#e5484d"], [1, "#7d1128"]],
        opacity=0.8,
        meta="from afar",
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{customdata}<br>bad in %{z:,} steps near %{x:,.0f}<extra></extra>",
    )
    figure.add_scatter(
        x=[step for step, _ in marks],
        y=[row for _, row in marks],
        row=i,
        col=1,
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        meta="from afar",
        marker={"symbol": "line-ns", "size": 12, "line": {"width": 1, "color": "#7d1128"}},
    )
    _add_single_steps(figure, summary, layers, names, i)
    figure.update_yaxes(
        range=[len(layers) - 0.5, -0.5],
        showgrid=False,
        tickmode="array",
        tickvals=list(range(len(layers))),
        ticktext=names,
        row=i,
        col=1,
    )


def _add_single_steps(
    figure: go.Figure, summary: Summary, layers: Sequence[str], names: Sequence[str], i: int
) -> None:
    """Draws the bad steps of each layer as bars exactly one step wide, visible after zooming in."""
    x: list[float | None] = []
    y: list[int | None] = []
    hover: list[str] = []
    width = 1 << summary.layer_steps.shift
    for row, (layer, name) in enumerate(zip(layers, names, strict=True)):
        if layer not in summary.layer_steps.names:
            continue
        runs: list[list[int]] = []
        for key, _, _ in summary.layer_steps.items(layer):
            if runs and runs[-1][1] == key * width:
                runs[-1][1] += width
            else:
                runs.append([key * width, (key + 1) * width])
        for first, end in runs:
            x += [first - 0.5, end - 0.5, None]
            y += [row, row, None]
            steps = f"step {first:,}" if end - first == 1 else f"steps {first:,} to {end - 1:,}"
            hover += [f"{name}: bad in {steps}"] * 3
    figure.add_scatter(
        x=x,
        y=y,
        text=hover,
        row=i,
        col=1,
        mode="lines",
        line={"width": 14, "color": "#e5484d"},
        visible=False,
        showlegend=False,
        meta="close by",
        hovertemplate="%{text}<extra></extra>",
    )


def _label(text: str, length: int) -> str:
    """Escapes a name for Plotly, which interprets some HTML as links and markup.

    Long names keep their end, which is the more specific part. Quotes are not escaped, because
    Plotly does not know their entities.
    """
    text = text if len(text) <= length else f"…{text[1 - length :]}"
    return html.escape(printable(text), quote=False)


def _lay_out(figure: go.Figure, summary: Summary, rows: Sequence[_Row]) -> None:
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


def _legend_lines(figure: go.Figure, row: _Row, i: int) -> int:
    """Legend lines between title and plot on a phone; 0 if the legend fits beside the title."""
    traces = figure.select_traces(row=i, col=1, selector={"type": "scatter"})
    width = sum(42 + 6.5 * len(trace.name) for trace in traces if trace.showlegend)
    if width + 8 * len(row.title) <= _PHONE:
        return 0
    return math.ceil(width / _PHONE)
