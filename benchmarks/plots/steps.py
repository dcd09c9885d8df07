"""The chart of steps: the time that guarding adds to an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.plots.look import INK, QUIET, color_of, frame, label_of
from fastguard.commands.bench.results import Result

STEP_BARS = (
    "GuardedOptimizer",
    "GuardedOptimizer flat",
    "GuardedOptimizer flat parameters",
    "clip + isfinite(norm) + step",
    "GradScaler + clip + step",
    "isfinite + clip + step",
)


def steps(result: Result) -> Figure | None:
    """Draws the added time of a guarded step in percent of the bare step."""
    rows = [r for r in result["rows"] if r["optimizer"]]
    groups = list(dict.fromkeys((r["name"], r["optimizer"]) for r in rows))
    if not groups:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 2.2 + 0.85 * len(groups)), sharey=True, sharex=False
    )
    for axis, situation in zip(axes, ("nothing to clip", "clipping"), strict=True):
        _step_bars(axis, rows, groups, situation)
        axis.set_title(situation[0].upper() + situation[1:])
    axes[0].set_yticks(range(len(groups)), [f"{optimizer}\n{name}" for name, optimizer in groups])
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color_of(b), label=label_of(b)) for b in STEP_BARS]
    title = "What guarding adds to an optimizer step, in percent of the bare step"
    frame(figure, result, title, handles=handles, legend_rows=2)
    return figure


def _step_bars(
    axis: Axes, rows: list[dict[str, Any]], groups: Sequence[tuple], situation: str
) -> None:
    thick = 0.8 / len(STEP_BARS)
    for y, group in enumerate(groups):
        here = {
            r["contender"]: r
            for r in rows
            if (r["name"], r["optimizer"]) == group and r["situation"] == situation
        }
        if "bare step" not in here:
            axis.annotate(
                "not measured",
                (0, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=QUIET,
            )
            continue
        bare = here["bare step"]["ms"]["p50"]
        for k, contender in enumerate(STEP_BARS):
            if contender not in here:
                continue
            added = 100 * (here[contender]["ms"]["p50"] / bare - 1)
            at = y - 0.4 + (k + 0.5) * thick
            axis.barh(at, added, thick * 0.86, color=color_of(contender))
            axis.annotate(
                f"{added:+.0f} %",
                (added, at),
                (3 if added >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if added >= 0 else "right",
                va="center",
                fontsize=6.5,
                color=INK if contender == "GuardedOptimizer" else QUIET,
            )
    axis.axvline(0, color=INK, lw=1)
    axis.set_xscale("symlog", linthresh=25)
    axis.xaxis.set_major_locator(FixedLocator((-60, -20, 0, 20, 60, 200, 600)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "bare"))
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.12)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
