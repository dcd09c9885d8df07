"""Colors, labels and helpers shared by the rows of a report's figure."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

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


@dataclass(frozen=True, slots=True)
class Row:
    """One plot of the figure.

    Attributes:
        title: The title.
        height: In pixels.
        draw: Adds its traces to the figure, given the row's number from 1.
        layers: The layers, if the plot has one line per layer.
        is_curve: Whether bad steps are marked above the plot.
    """

    title: str
    height: float
    draw: Callable[[go.Figure, int], None]
    layers: Sequence[str] = ()
    is_curve: bool = False


def label(text: str, length: int) -> str:
    """Escapes a name for Plotly, which interprets some HTML as links and markup.

    Long names keep their end, which is the more specific part. Quotes are not escaped, because
    Plotly does not know their entities.
    """
    text = text if len(text) <= length else f"…{text[1 - length :]}"
    return html.escape(printable(text), quote=False)


def in_natural_order(names: Sequence[str]) -> list[str]:
    """Sorts names so that `blocks.9` comes before `blocks.10`."""
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = _NUMBER.split(name)  # every second part of the split is a number
    return [(i % 2 > 0, int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


_NUMBER = re.compile(r"([0-9]{1,18})")


def show_layers(figure: go.Figure, layers: Sequence[str], i: int) -> None:
    """Gives row `i` one line per layer, the first on top, labeled with its name."""
    figure.update_yaxes(
        range=[len(layers) - 0.5, -0.5],
        showgrid=False,
        tickmode="array",
        tickvals=list(range(len(layers))),
        ticktext=[label(layer, 400) for layer in layers],
        row=i,
        col=1,
    )


def height_of(layers: Sequence[str]) -> float:
    """The height in pixels of a row with one line per layer."""
    return 10 + 18 * len(layers)
