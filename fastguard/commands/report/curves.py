"""The curves of a report: losses, gradient norm, clip coefficient and learning rate.

Every line passes through the minimum and maximum of each bucket, at the steps where they occurred,
and through every step around an incident. So all points are measured values, and no extreme is
lost. If buckets contain more than one step, their means are drawn on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import plotly.graph_objects as go

from fastguard.commands.report.columns import COEF, LIMIT, LR, NORM, UNITS, Series
from fastguard.commands.report.style import ACTIONS, COLORS, Row, label
from fastguard.commands.report.summary import Summary

_HEIGHT = 170
_OVERLAYS = 20  # the marks of row i use axis i + `_OVERLAYS`
_WIDE_RANGE = 50.0  # max/min ratio from which an axis is logarithmic


@dataclass(frozen=True, slots=True)
class _Line:
    series: Series
    label: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True, slots=True)
class _Plot:
    title: str
    height: float
    lines: tuple[_Line, ...] = ()


def curve_rows(summary: Summary) -> list[Row]:
    """The rows with a curve that has data."""
    return [
        Row(plot.title, plot.height, partial(_add_lines, summary, plot), is_curve=True)
        for plot in _plots(summary)
    ]


def _plots(summary: Summary) -> list[_Plot]:
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
        _Plot("Loss", 1.3 * _HEIGHT, tuple(loss_lines)),
        _Plot("Gradient norm", 1.3 * _HEIGHT, tuple(norm_lines)),
        _Plot(
            "Clip coefficient",
            0.7 * _HEIGHT,
            (
                _Line(COEF, "clip coefficient", COLORS[2]),
                _Line(UNITS, "share of clipped units", COLORS[4]),
            ),
        ),
        _Plot("Learning rate", 0.7 * _HEIGHT, (_Line(LR, "learning rate", COLORS[3]),)),
    ]
    return [row for row in rows if any(line.series in found for line in row.lines)]


def _add_lines(summary: Summary, plot: _Plot, figure: go.Figure, i: int) -> None:
    logarithmic = _is_wide(summary, plot)
    solid = [line for line in plot.lines if line.dash == "solid" and line.series in summary.curves]
    for n, line in enumerate(plot.lines):
        curve = summary.curves.get(line.series)
        if curve is None:
            continue
        x, y = curve.x, curve.y
        if logarithmic:
            y = np.where(y > 0, y, np.nan)  # a logarithmic axis cannot show 0
        if not np.isfinite(y).any():
            continue
        named = len(solid) > 1 or line.label.lower() != plot.title.lower()
        coarse = summary.shift > 0 and line.dash == "solid"
        common = {
            "name": label(line.label, 30),
            "legendgroup": f"{i} {n}",
            "mode": "lines" if len(x) > 1 else "markers",
            "hovertemplate": "step %{x:,}: %{y:.6~g}<extra>%{fullData.name}</extra>",
        }
        figure.add_scatter(
            x=x,
            y=_short(y),
            row=i,
            col=1,
            line={"color": line.color, "width": 1 if coarse else 1.4, "dash": line.dash},
            opacity=0.4 if coarse else 1.0,
            meta="extremes" if coarse else "steps" if line.dash == "solid" else None,
            showlegend=named and not coarse,
            **common,
        )
        alone = _isolated(y)
        if alone.any() and len(x) > 1:  # a line does not show a single point between two gaps
            figure.add_scatter(
                x=x[alone],
                y=_short(y[alone]),
                row=i,
                col=1,
                marker={"color": line.color, "size": 4},
                showlegend=False,
                meta="isolated",
                **{**common, "mode": "markers"},
            )
        if coarse:
            figure.add_scatter(
                x=curve.middle,
                y=_short(curve.mean),
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
    elif (shown := _range(summary, plot)) is not None:
        figure.update_yaxes(range=shown, row=i, col=1)


def _short(y: np.ndarray) -> np.ndarray:
    """The values as float32, which is precise enough for a plot, if they are in its range."""
    size = np.abs(y[np.isfinite(y) & (y != 0)])
    limits = np.finfo(np.float32)
    fits = ((size >= limits.tiny) & (size <= limits.max)).all()
    return y.astype(np.float32) if fits else y


def _isolated(y: np.ndarray) -> np.ndarray:
    """Which finite values have no finite neighbor, bool `(n,)`."""
    finite = np.pad(np.isfinite(y), 1)
    return finite[1:-1] & ~finite[:-2] & ~finite[2:]


def _is_wide(summary: Summary, plot: _Plot) -> bool:
    """Whether a row needs a logarithmic axis and its values allow one."""
    values = _drawn_values(summary, plot)
    if plot.title == "Gradient norm":
        values = values[values > 0]
    elif plot.title != "Loss":
        return False
    return bool(len(values) and values.min() > 0 and values.max() > _WIDE_RANGE * values.min())


def _drawn_values(summary: Summary, plot: _Plot) -> np.ndarray:
    drawn = [summary.curves[line.series].y for line in plot.lines if line.series in summary.curves]
    values = np.concatenate(drawn)
    return values[np.isfinite(values)]


def _range(summary: Summary, plot: _Plot) -> list[float] | None:
    """The axis range of a row with nearly constant values; None to fit the data.

    Around a constant, Plotly would show ±1, which is a thousand times a usual learning rate.
    """
    if plot.title == "Clip coefficient":
        return [0.0, 1.05]
    values = _drawn_values(summary, plot)
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return None
    return [-1.0, 1.0] if low == 0 else sorted((0.0, 1.5 * low))


def add_marks(figure: go.Figure, summary: Summary, rows: Sequence[Row]) -> None:
    """Draws a triangle above every curve at each bad step, on an axis that does not zoom."""
    steps: dict[str, list[int]] = {}
    for name in summary.events.names:
        action = name.partition("\n")[2]
        steps.setdefault(action, []).extend(first for _, _, first in summary.events.items(name))
    for i, row in enumerate(rows if steps else (), 1):
        if not row.is_curve:
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
                    text=label(action, 60),
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
