"""The layers with non-finite gradients, along the steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import plotly.graph_objects as go

from fastguard.commands.report.style import Row, height_of, in_natural_order, label, show_layers
from fastguard.commands.report.summary import Summary
from fastguard.commands.report.tally import Tally

_MAX_LAYERS = 40
_HEAT_COLUMNS = 96


def culprit_rows(summary: Summary) -> list[Row]:
    """The row of layers with non-finite gradients, if there are any."""
    layers = _drawn_layers(summary.layers)
    if not layers:
        return []
    draw = partial(_add_heat_map, summary, layers)
    return [Row("Non-finite gradients by layer", height_of(layers), draw, layers)]


def _drawn_layers(layers: Tally) -> list[str]:
    """The layers with the most bad steps, sorted by name in natural order."""
    most = sorted(layers.names, key=layers.total, reverse=True)[:_MAX_LAYERS]
    return in_natural_order(most)


def _add_heat_map(summary: Summary, layers: Sequence[str], figure: go.Figure, i: int) -> None:
    first, last = summary.first_step, summary.last_step
    # A cell that is one step wide would be too thin to see. Cells are therefore wider, and a thin
    # mark in each cell shows its first bad step.
    bits = max(summary.layers.shift, ((last - first) // _HEAT_COLUMNS).bit_length())
    counts = np.full((len(layers), (last >> bits) - (first >> bits) + 1), np.nan)
    marks = []
    for row, layer in enumerate(layers):
        for key, count, step in summary.layers.items(layer):
            column = (key >> (bits - summary.layers.shift)) - (first >> bits)
            counts[row, column] = np.nansum([counts[row, column], count])
            marks.append((step, row))
    columns = np.arange(counts.shape[1]) + (first >> bits)
    names = [label(layer, 400) for layer in layers]
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
        meta="overview",
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
        meta="overview",
        marker={"symbol": "line-ns", "size": 12, "line": {"width": 1, "color": "#7d1128"}},
    )
    _add_single_steps(figure, summary, layers, names, i)
    show_layers(figure, layers, i)


def _add_single_steps(
    figure: go.Figure, summary: Summary, layers: Sequence[str], names: Sequence[str], i: int
) -> None:
    """Draws bad steps as bars exactly one step wide, which become visible after zooming in."""
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
        meta="detail",
        hovertemplate="%{text}<extra></extra>",
    )
