"""The chart of ratios: speed relative to torch, and the error of the norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.plots.look import FAINT, INK, QUIET, bytes_of, color_of, frame, label_of
from fastguard.commands.bench.results import Result

BARS = ("fastguard", "fastguard flat", "GradScaler + clip", "isfinite + clip")


def ratios(result: Result) -> Figure | None:
    """Draws bars from the line of torch to the right (faster) or to the left (slower)."""
    rows = [r for r in result["rows"] if not (r["series"] or r["optimizer"])]
    groups = list(
        dict.fromkeys(
            (r["name"], r["dtype"], r["cold"])
            for r in rows
            if r["contender"] == "fastguard" and r["situation"] == "nothing to clip"
        )
    )
    # Compiled cases compare something else, which the table shows.
    compiled = {r["name"] for r in rows if r["contender"] == "torch compiled"}
    groups = [g for g in groups if g[0] not in compiled]
    if not groups:
        return None
    bars = [b for b in BARS if any(r["contender"] == b for r in rows)]
    height = 1.9 + 0.46 * len(groups)
    figure, axes = plt.subplots(1, 3, figsize=(11, height), width_ratios=(5, 5, 2.6), sharey=True)
    for axis, situation in zip(axes[:2], ("nothing to clip", "clipping"), strict=True):
        _ratio_bars(axis, rows, groups, situation, bars)
        axis.set_title(situation[0].upper() + situation[1:])
    _norm_errors(axes[2], rows, groups)
    axes[0].set_yticks(range(len(groups)), [_group_label(rows, g) for g in groups])
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    handles = [
        *(plt.Rectangle((0, 0), 1, 1, color=color_of(b), label=label_of(b)) for b in bars),
        plt.Line2D([], [], color=color_of("torch foreach"), lw=2, label="torch.nn.utils"),
    ]
    title = "Clipping gradients: speed as a multiple of torch.nn.utils.clip_grad_norm_"
    frame(figure, result, title, handles=handles)
    return figure


def _ratio_bars(
    axis: Axes,
    rows: list[dict[str, Any]],
    groups: Sequence[tuple],
    situation: str,
    bars: Sequence[str],
) -> None:
    thick = 0.8 / len(bars)
    for y, group in enumerate(groups):
        for k, contender in enumerate(bars):
            row = _row(rows, group, situation, contender)
            if row is None:
                continue
            r, at = row["ratio"], y - 0.4 + (k + 0.5) * thick
            axis.barh(at, r["p50"] - 1, thick * 0.86, left=1, color=color_of(contender))
            axis.plot([r["p20"], r["p80"]], [at, at], color=INK, lw=0.7, alpha=0.75)
            if contender == "fastguard":
                right = max(r["p80"], 1.0)
                axis.text(
                    right * 1.07, at, f"{r['p50']:.2g}×", va="center", fontsize=7.5, color=INK
                )
    axis.axvline(1, color=color_of("torch foreach"), lw=2, zorder=3)
    axis.set_xscale("log")
    axis.set_xlim(1 / 24, 40)
    ticks = (1 / 16, 1 / 4, 1, 4, 16, 64)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(FixedLocator((1 / 8, 1 / 2, 2, 8, 32)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}×" if v >= 1 else f"1/{1 / v:g}")
    )
    axis.grid(axis="x")
    axis.set_xlabel("slower   ←   speed   →   faster")
    axis.spines["left"].set_visible(False)


def _norm_errors(axis: Axes, rows: list[dict[str, Any]], groups: Sequence[tuple]) -> None:
    for y, group in enumerate(groups):
        pair = []
        for contender in ("torch foreach", "fastguard"):
            row = _row(rows, group, "nothing to clip", contender)
            if row is None or row["norm_error"] is None:
                continue
            error = min(max(float(row["norm_error"]), 1e-10), 1.0)
            pair.append(error)
            ms = (
                9 if contender == "torch foreach" else 5.5
            )  # larger, so that it is visible behind our marker if both agree
            axis.plot(error, y, "o", color=color_of(contender), ms=ms, zorder=3)
            if float(row["norm_error"]) > 1:
                axis.text(0.45, y - 0.27, "overflows", fontsize=7, ha="right", color=QUIET)
        axis.plot(pair, [y] * len(pair), color=FAINT, lw=2, zorder=1)
    axis.set_xscale("log")
    axis.set_xlim(3e-11, 4)
    axis.xaxis.set_major_locator(FixedLocator((1e-10, 1e-7, 1e-4, 1e-1)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.axvline(1e-7, color=QUIET, lw=0.8, ls=(0, (3, 3)))
    axis.grid(axis="x")
    axis.set_title("Error of the norm")
    axis.set_xlabel("relative, against float64")
    axis.spines["left"].set_visible(False)


def _row(
    rows: list[dict[str, Any]], group: tuple, situation: str, contender: str
) -> dict[str, Any] | None:
    for r in rows:
        if (r["name"], r["dtype"], r["cold"]) == group and (
            (r["situation"], r["contender"]) == (situation, contender)
        ):
            return r
    return None


def _group_label(rows: list[dict[str, Any]], group: tuple) -> str:
    row = next(r for r in rows if (r["name"], r["dtype"], r["cold"]) == group)
    name, dtype, cold = group
    size = f"{row['tensors']:,} tensors, {bytes_of(row['grad_bytes'])}"
    return f"{name} {dtype}{', cold' if cold else ''}\n{size}"
