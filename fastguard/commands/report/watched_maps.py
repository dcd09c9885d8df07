"""Heat maps of watched steps: gradient norm, and |update| / |weight|, by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from fastguard.commands.report.layer_history import LayerHistory
from fastguard.commands.report.style import Row, height_of, in_natural_order, label, show_layers
from fastguard.commands.report.summary import Summary

_MAX_LAYERS = 40
_COLORS = [[0, "#2b6cb0"], [0.5, "rgba(140,140,140,0.15)"], [1, "#d6303a"]]
_HEALTHY_RATIO = 1e-3
_DECADES = 2.0  # powers of ten between the middle of the color scale and its ends


def watched_rows(summary: Summary) -> list[Row]:
    """The rows of quantities that were watched."""
    watched = summary.watched
    maps = [
        ("Gradient norm by layer", watched.norms, np.nanmedian),
        ("Update / weight by layer", watched.ratios, lambda values: _HEALTHY_RATIO),
    ]
    return [_row(*one) for one in maps if one[1].layers]


def _row(title: str, history: LayerHistory, middle: Callable[[np.ndarray], float]) -> Row:
    keys = [key for key, _ in history.columns]
    values, colors = {}, {}
    for layer in history.layers:
        cells = history.cells(layer)
        values[layer] = np.array([cells.get(key, (np.nan, 0))[0] for key in keys])
        colors[layer] = np.log10(values[layer] / middle(values[layer]))
    furthest = sorted(colors, key=lambda layer: np.nanmax(np.abs(colors[layer])), reverse=True)
    layers = in_natural_order(furthest[:_MAX_LAYERS])
    draw = partial(
        _add_map, history, layers, [values[name] for name in layers], [colors[n] for n in layers]
    )
    return Row(title, height_of(layers), draw, layers)


def _add_map(
    history: LayerHistory,
    layers: list[str],
    values: list[np.ndarray],
    colors: list[np.ndarray],
    figure: go.Figure,
    i: int,
) -> None:
    steps = [step for _, step in history.columns]
    names = [label(layer, 60) for layer in layers]
    figure.add_heatmap(
        x=_edges(steps),
        y=np.arange(len(layers) + 1) - 0.5,
        z=np.round(colors, 3),
        customdata=[
            [f"{name}: {value:.3g}" for value in row]
            for name, row in zip(names, values, strict=True)
        ],
        row=i,
        col=1,
        colorscale=_COLORS,
        zmin=-_DECADES,
        zmax=_DECADES,
        meta="watched",
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{customdata}<br>near step %{x:,.0f}<extra></extra>",
    )
    show_layers(figure, layers, i)


def _edges(steps: list[int]) -> list[float]:
    """The edges of the columns: each watched step represents the steps until the next one."""
    gaps = [after - before for before, after in pairwise(steps)]
    last = gaps[-1] if gaps else 1
    return [float(step) for step in steps] + [float(steps[-1] + last)]
