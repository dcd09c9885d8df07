"""Places labels in a chart so that they do not overlap.

Call these functions after the layout is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks.plots.look import QUIET

LINE = 1.25
"""Height of a line of text, as a multiple of the font size."""


class Label(NamedTuple):
    """A label for a point, in data coordinates."""

    x: float
    y: float
    text: str
    color: str = QUIET


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Moves numbers as little as possible (in squares) so that they are at least `gap` apart.

    This is isotonic regression by pooling adjacent violators.

    Example:
        >>> spread(np.array([5.0, 1.0, 5.5]), 1.0)
        array([4.75, 1.  , 5.75])
    """
    order = np.argsort(wanted, kind="stable")
    pools: list[tuple[float, int]] = []  # mean and length of each pool
    for rank, index in enumerate(order):
        mean, n = float(wanted[index]) - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, m = pools.pop()
            mean, n = (before * m + mean * n) / (m + n), m + n
        pools.append((mean, n))
    placed = np.empty(len(wanted))
    placed[order] = np.repeat([m for m, _ in pools], [n for _, n in pools])
    placed[order] += gap * np.arange(len(wanted))
    return placed


def label_ends(axis: Axes, labels: Sequence[Label], *, size: float = 7.5) -> None:
    """Writes a label to the right of each end of a line, moved up or down to be readable."""
    if not labels:
        return
    points_per_pixel = 72 / axis.figure.dpi
    lines = max(label.text.count("\n") + 1 for label in labels)
    at = axis.transData.transform([(label.x, label.y) for label in labels])[:, 1] * points_per_pixel
    for label, y, moved in zip(labels, at, spread(at, lines * LINE * size), strict=True):
        axis.annotate(
            label.text,
            (label.x, label.y),
            (7, moved - y),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=label.color,
            annotation_clip=False,
        )


def name_points(
    figure: Figure,
    axis: Axes,
    labels: Sequence[Label],
    others: Sequence[tuple[float, float]],
    *,
    size: float = 6.5,
) -> None:
    """Writes a name below each point, with a thin line to it.

    Names are moved down until they cover neither another name nor one of the `others`, which are
    points in data coordinates.
    """
    radius = 4 * axis.figure.dpi / 72
    taken = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
        for x, y in axis.transData.transform(np.reshape(others, (-1, 2)))
    ]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for label in sorted(labels, key=lambda label: (label.x, -label.y)):
        text = axis.annotate(
            label.text,
            (label.x, label.y),
            (0, -11),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=label.color,
            arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        below = -11.0
        # the extent of the text alone, since the extent of an annotation includes the line
        while any(Text.get_window_extent(text, renderer).overlaps(box) for box in taken):
            below -= LINE * size
            text.set_position((0, below))
            text.update_positions(renderer)
        taken.append(Text.get_window_extent(text, renderer).frozen())
