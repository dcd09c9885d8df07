"""The picture of an incident: the losses of both runs on top, the guarded gradient norm below.

Values are drawn in a pale color, with the median of the last `SMOOTH` finite values on top. A
single spike does not change the median, but would show as a plateau in a mean.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastguard.commands.demo.incidents import Incident, Outcome
from fastguard.commands.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette is safe for color blindness.
BEFORE, GUARDED, INK, FAINT = "#D55E00", "#009E73", "#333333", "#BBBBBB"
SMOOTH = 10


def draw(incident: Incident, before: Outcome, guarded: Outcome, path: Path) -> None:
    """Draws both runs into a PNG file.

    Args:
        incident: The incident, whose title is used.
        before: The original run.
        guarded: The same run with fastguard.
        path: Output file; replaced only by a complete picture.
    """
    from matplotlib.figure import Figure  # avoids pyplot's windows and global state

    figure = Figure(figsize=(10, 5.6), dpi=130, layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(8, 5))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=9)
    _draw_losses(top, before, guarded)
    _draw_norms(bottom, guarded)
    bottom.set_xlabel("batch", fontsize=9, color=INK)
    figure.suptitle(incident.title, x=0.01, ha="left", fontsize=13, weight="bold", color=INK)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _draw_losses(axes: Axes, before: Outcome, guarded: Outcome) -> None:
    """Draws the losses, with NaN and Inf on a separate line above the finite ones."""
    finite = [v for run in (before, guarded) for v in run.losses if math.isfinite(v)] or [1.0]
    ceiling = 1.15 * max(finite)
    is_spiky = max(finite) > 100 * statistics.median(finite)
    if is_spiky and min(finite) > 0:
        axes.set_yscale("log")
        ceiling = 3 * max(finite)
    for run, color, width, name in (
        (guarded, GUARDED, 2.4, "with fastguard"),
        (before, BEFORE, 1.2, "as it was"),
    ):
        steps = range(1, len(run.losses) + 1)
        _draw_line(axes, steps, run.losses, color=color, width=width, label=name)
        lost = [i for i, v in enumerate(run.losses, start=1) if not math.isfinite(v)]
        axes.plot(lost, [ceiling] * len(lost), "x", color=color, markersize=5)
    if not all(math.isfinite(v) for v in before.losses):
        beside = {"xycoords": ("axes fraction", "data"), "xytext": (4, 6)}
        axes.annotate(
            "NaN, Inf", (0, ceiling), **beside, textcoords="offset points", fontsize=9, color=INK
        )
    axes.set_ylabel(f"training loss, median of {SMOOTH} batches", fontsize=9, color=INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), frameon=False, fontsize=9, ncols=2)


def _draw_norms(axes: Axes, guarded: Outcome) -> None:
    records = guarded.records
    norms = [r.torch_norm for r in records]
    _draw_line(axes, [r.step for r in records], norms, color=GUARDED, width=1.6)
    skipped = [r for r in records if r.action == "skipped"]
    level = max((r.total_norm for r in records), default=1.0)
    axes.plot([r.step for r in skipped], [level] * len(skipped), "o", color=GUARDED, mfc="white")
    if skipped:
        axes.annotate(
            f"○ skipped: {len(skipped)}",
            (skipped[0].step, level),
            xytext=(-8, 8),
            textcoords="offset points",
            fontsize=9,
            color=GUARDED,
        )
    axes.set_yscale("log")
    axes.set_ylabel("gradient norm", fontsize=9, color=INK)


def _draw_line(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    color: str,
    width: float,
    label: str | None = None,
) -> None:
    """Draws values and their medians, with gaps where the values are not finite."""
    finite = [v if math.isfinite(v) else math.nan for v in values]
    axes.plot(steps, finite, color=color, linewidth=0.8, alpha=0.4)
    axes.plot(steps, smoothed(finite), color=color, linewidth=width, label=label)


def smoothed(values: Sequence[float]) -> list[float]:
    """The median of each value and up to `SMOOTH - 1` finite values before it; NaN stays NaN.

    Example:
        >>> smoothed([1.0, math.nan, 3.0])
        [1.0, nan, 2.0]
    """
    window: deque[float] = deque(maxlen=SMOOTH)
    medians = []
    for value in values:
        if not math.isnan(value):
            window.append(value)
        medians.append(math.nan if math.isnan(value) else statistics.median(window))
    return medians
