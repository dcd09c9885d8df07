"""The picture of the demo: training loss on top, gradient norm below, faults marked in both."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastguard.commands.demo.faults import Fault
from fastguard.commands.demo.training import Bare, Clipped, Guarded, Run
from fastguard.commands.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette is safe for color blindness.
COLORS = {Bare.name: "#D55E00", Clipped.name: "#0072B2", Guarded.name: "#009E73"}
# The guarded line is wider, so that it stays visible on both sides where two runs agree.
WIDTHS = {Bare.name: 1.6, Clipped.name: 1.6, Guarded.name: 3.0}
INK, FAINT, GRID = "#333333", "#BBBBBB", "#EEEEEE"
SMOOTH = 10  # steps in the moving average of the loss
CEILING = 3e5  # height of NaN and Inf in the norm panel


def draw(runs: Sequence[Run], faults: Sequence[Fault], max_norm: float, path: Path) -> None:
    """Draws the runs into a PNG file.

    Args:
        runs: Runs of equal length.
        faults: The injected faults.
        max_norm: The limit, drawn as a line.
        path: Output file; replaced only by a complete picture.
    """
    from matplotlib.figure import Figure  # avoids pyplot's windows and global state

    figure = Figure(figsize=(10, 6.2), dpi=130, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(8, 5))
    for axes in (top, bottom):
        _plain(axes)
        for first, last, _ in _groups(faults):
            axes.axvspan(first - 0.5, last + 0.5, color=GRID, zorder=0.4)
            axes.axvline(first, color=FAINT, linewidth=0.8, zorder=0.5)
    _label_faults(top, faults)
    _draw_losses(top, runs)
    _draw_norms(bottom, runs, max_norm)
    figure.align_ylabels()
    bottom.set(xlim=(0, len(runs[0].losses)))
    bottom.set_xlabel("step", fontsize=9, color=INK)
    figure.suptitle(_title(runs, faults), x=0.01, ha="left", fontsize=13, weight="bold", color=INK)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _title(runs: Sequence[Run], faults: Sequence[Fault]) -> str:
    if not faults:
        return "Same weights, same batches, no faults"
    alive = [run.name for run in runs if run.destroyed_at is None]
    survivor = f"only {alive[0]} survives" if len(alive) == 1 else f"{len(alive)} runs survive"
    return f"Same weights, same batches, same faults: {survivor}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _groups(faults: Sequence[Fault]) -> list[tuple[int, int, str]]:
    """`(first step, last step, label)` of each fault; a burst is one entry."""
    groups = [(f.step, f.step, f.kind.value) for f in faults if not f.in_burst]
    burst = [f.step for f in faults if f.in_burst]
    return groups + ([(burst[0], burst[-1], f"{len(burst)} faults in a row")] if burst else [])


def _label_faults(axes: Axes, faults: Sequence[Fault]) -> None:
    for first, last, label in _groups(faults):
        axes.annotate(
            textwrap.fill(label, 12),
            ((first + last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    alive = [run for run in runs if run.destroyed_at is None]
    for run in reversed(runs):
        color = COLORS[run.name]
        steps, losses = _finite(run.losses)
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color=color, alpha=0.22, linewidth=0.7)
        axes.plot(steps, smooth, color=color, linewidth=WIDTHS[run.name])
        if run.destroyed_at is None:
            text = f"{run.name}: validation loss {run.validation:.2f}"
            above = (0, 20 + 15 * alive.index(run))
            _annotate(axes, text, (len(run.losses), smooth[-1]), above, "right", color)
        elif steps:
            axes.plot(steps[-1], smooth[-1], marker="X", markersize=9, color=color, zorder=5)
            text = f"{run.name}: weights are NaN"
            beside = (12, 10) if run.name == Clipped.name else (12, -4)
            _annotate(axes, text, (steps[-1], smooth[-1]), beside, "left", color)
    # Leaves out the first steps, since their high loss would flatten the curves.
    shown = [v for run in runs for v in _finite(run.losses)[1][len(run.losses) // 14 :]]
    if shown:
        axes.set_ylim(min(shown) - 0.15, max(shown) + 0.15)
    axes.set_ylabel("training loss, nats per byte", fontsize=9, color=INK)


def _draw_norms(axes: Axes, runs: Sequence[Run], max_norm: float) -> None:
    """Draws norms on a log scale, with NaN and Inf on a separate line above."""
    for run in reversed(runs):
        color = COLORS[run.name]
        skipped = [record for record in run.records if record.action == "skipped"]
        gaps = {record.step for record in skipped}
        norms = [math.nan if i in gaps else v for i, v in enumerate(run.norms, start=1)]
        steps = range(1, len(norms) + 1)
        axes.plot(steps, norms, color=color, linewidth=WIDTHS[run.name] / 2)
        if run.destroyed_at is not None:
            lost = range(run.destroyed_at, len(norms) + 1)
            # the dashes of the two runs alternate
            dashes = (0, (5, 5)) if run.name == Bare.name else (5, (5, 5))
            axes.plot(lost, [CEILING] * len(lost), color=color, linewidth=2, linestyle=dashes)
            axes.plot(lost[0], CEILING, marker="X", markersize=8, color=color, zorder=5)
        if skipped:
            heights = [CEILING if r.n_culprits else r.total_norm for r in skipped]
            axes.plot(
                [r.step for r in skipped],
                heights,
                "o",
                color=color,
                markersize=7,
                markerfacecolor="white",
                markeredgewidth=1.8,
                zorder=6,
            )
            _annotate(
                axes,
                "○ skipped by fastguard",
                (skipped[0].step, heights[0]),
                (10, -4),
                "left",
                color,
            )
    axes.axhline(max_norm, color=INK, linewidth=0.8, zorder=0.6)
    axes.annotate(
        "max_norm",
        (1, max_norm),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )
    axes.set_yscale("log")
    if any(run.destroyed_at or run.skipped for run in runs):
        axes.set_ylim(top=CEILING * 4)
        axes.set_yticks([1, 10, 100, 1e3, 1e4, CEILING])
        axes.set_yticklabels(["1", "10", "100", "1,000", "10,000", "NaN, Inf"])
    axes.minorticks_off()
    axes.set_ylabel("gradient norm", fontsize=9, color=INK)


def _annotate(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[int, int],
    align: Literal["left", "right"],
    color: str,
) -> None:
    """Draws a bold label beside a point, readable on top of curves."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=align,
        color=color,
        weight="bold",
        fontsize=9.5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        zorder=7,
    )


def _finite(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The steps with finite values, and those values."""
    kept = [(step, v) for step, v in enumerate(values, start=1) if math.isfinite(v)]
    return [step for step, _ in kept], [v for _, v in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Each value averaged with up to `SMOOTH - 1` before it."""
    windows = (values[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
