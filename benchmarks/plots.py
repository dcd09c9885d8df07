"""The charts, drawn from a result file and nothing else: `python -m benchmarks.plots FILE.json`.

Every chart says at its foot which machine, versions, commit and date it shows, and the command that
makes it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.growth import AXES, contenders_of, curve
from fastguard.bench.machine import title_of
from fastguard.bench.results import Result, load

INK, QUIET, FAINT = "#1f2933", "#6b7785", "#d9dfe5"
COLORS = {
    "fastguard": "#0b7a75",
    "fastguard flat": "#35b0a2",
    "fastguard flat trusted": "#8fd9c4",
    "fastguard measure": "#0b7a75",
    "fastguard measure flat": "#35b0a2",
    "GuardedOptimizer": "#0b7a75",
    "GuardedOptimizer flat": "#35b0a2",
    "torch foreach": "#d9822b",
    "clip + isfinite(norm) + step": "#d9822b",
    "GradScaler + clip": "#9aa5b1",
    "GradScaler + clip + step": "#9aa5b1",
    "isfinite + clip": "#c3ccd5",
    "isfinite + clip + step": "#c3ccd5",
}
LABELS = {
    "torch foreach": "torch",
    "isfinite + clip": "isfinite on every gradient, then torch",
    "GradScaler + clip": "GradScaler.unscale_, then torch",
    "fastguard flat": "fastguard, flat buckets",
    "fastguard flat trusted": "fastguard, flat buckets, trusted",
    "fastguard measure": "tensor by tensor",
    "fastguard measure flat": "flat buckets",
    "clip + isfinite(norm) + step": "torch: clip, if isfinite(norm)",
    "isfinite + clip + step": "torch: isfinite on every gradient, clip",
    "GradScaler + clip + step": "torch: GradScaler, clip",
    "GuardedOptimizer flat": "GuardedOptimizer, flat buckets",
}
BARS = ("fastguard", "fastguard flat", "GradScaler + clip", "isfinite + clip")
STEP_BARS = (
    "GuardedOptimizer",
    "GuardedOptimizer flat",
    "clip + isfinite(norm) + step",
    "GradScaler + clip + step",
    "isfinite + clip + step",
)
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": QUIET,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "fastguard",  # the same result gives the same file
}


def draw(result_file: Path, folder: Path) -> list[Path]:
    """Draws every chart that the result has data for, as PNG and SVG.

    Returns:
        What was written.
    """
    result = load(result_file)
    written = []
    charts = {"ratios": ratios, "steps": steps, "roofline": roofline, "growth": growth}
    for name, chart in charts.items():
        with plt.rc_context(STYLE):
            figure = chart(result)
            if figure is None:
                continue
            for suffix in ("png", "svg"):
                path = folder / f"{result_file.stem}-{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def color_of(contender: str) -> str:
    return COLORS.get(contender, QUIET)


def label_of(contender: str) -> str:
    return LABELS.get(contender, contender)


# Ratios: how many times torch's speed, and how far the norm is off.


def ratios(result: Result) -> Figure | None:
    """Bars that leave the line of torch to the right (faster) or to the left (slower)."""
    rows = [r for r in result["rows"] if not (r["series"] or r["optimizer"])]
    groups = list(
        dict.fromkeys(
            (r["name"], r["dtype"], r["cold"])
            for r in rows
            if r["contender"] == "fastguard" and r["situation"] == "nothing to clip"
        )
    )
    # Where torch is compiled the point is another one; the table has it.
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
        plt.Line2D([], [], color=COLORS["torch foreach"], lw=2, label="torch.nn.utils"),
    ]
    title = "Clipping gradients: speed as a multiple of torch.nn.utils.clip_grad_norm_"
    _frame(figure, result, title, handles=handles)
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
    axis.axvline(1, color=COLORS["torch foreach"], lw=2, zorder=3)
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
            ms = 9 if contender == "torch foreach" else 5.5  # seen behind ours where both agree
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
    size = f"{row['tensors']:,} tensors, {_bytes(row['grad_bytes'])}"
    return f"{name} {dtype}{', cold' if cold else ''}\n{size}"


# Steps: what guarding adds to an optimizer step.


def steps(result: Result) -> Figure | None:
    """Time of a guarded step in percent of the bare one."""
    rows = [r for r in result["rows"] if r["optimizer"]]
    groups = list(dict.fromkeys((r["name"], r["optimizer"]) for r in rows))
    if not groups:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.62 * len(groups)), sharey=True, sharex=False
    )
    for axis, situation in zip(axes, ("nothing to clip", "clipping"), strict=True):
        _step_bars(axis, rows, groups, situation)
        axis.set_title(situation[0].upper() + situation[1:])
    axes[0].set_yticks(range(len(groups)), [f"{optimizer}\n{name}" for name, optimizer in groups])
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color_of(b), label=label_of(b)) for b in STEP_BARS]
    _frame(figure, result, "What guarding adds to an optimizer step", handles=handles)
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
            axis.text(0, y, "not measured", va="center", fontsize=7.5, color=QUIET)
            continue
        bare = here["bare step"]["ms"]["p50"]
        for k, contender in enumerate(STEP_BARS):
            if contender not in here:
                continue
            added = 100 * (here[contender]["ms"]["p50"] / bare - 1)
            at = y - 0.4 + (k + 0.5) * thick
            axis.barh(at, added, thick * 0.86, color=color_of(contender))
            place = max(added, 0.0)
            axis.annotate(
                f"{added:+.0f} %",
                (place, at),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                color=INK if contender == "GuardedOptimizer" else QUIET,
            )
    axis.axvline(0, color=INK, lw=1)
    axis.set_xscale("symlog", linthresh=25)
    axis.xaxis.set_major_locator(FixedLocator((0, 10, 20, 50, 100, 200, 400, 1000)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g} %" if v else "bare"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.12)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)


# Roofline: how much of the memory's speed is reached.


def roofline(result: Result) -> Figure | None:
    """Bytes that the case must move, by time, against the measured bandwidth."""
    rows = [
        r
        for r in result["rows"]
        if not r["optimizer"] and r["series"] in (None, "bytes") and r["dtype"] == "fp32"
    ]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, sharex=True)
    read, update = result["ceilings"]["read_gb_s"], result["ceilings"]["update_gb_s"]
    roofs = {"nothing to clip": (1, read), "clipping": (3, 3 / (1 / read + 2 / update))}
    for axis, (situation, (moved, roof)) in zip(axes, roofs.items(), strict=True):
        chosen = [r for r in rows if r["situation"] == situation and not r["cold"]]
        for contender in ("torch foreach", "fastguard", "fastguard flat"):
            mine = sorted((r for r in chosen if r["contender"] == contender), key=_size)
            speed = [moved * r["grad_bytes"] / r["device_ms"]["p50"] / 1e6 for r in mine]
            axis.plot(
                [r["grad_bytes"] for r in mine],
                speed,
                "o",
                ms=6,
                color=color_of(contender),
                alpha=0.9,
                markeredgecolor="white",
                markeredgewidth=0.7,
                label=label_of(contender),
            )
            if contender == "fastguard" and situation == "nothing to clip":
                _name_points(axis, [r for r in mine if not r["series"]], moved)
        axis.axhline(roof, color=INK, lw=1.2)
        axis.annotate(
            f"limit of memory, {roof:.0f} GB/s",
            (0, roof),
            (3, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
        )
        axis.axvline(result["machine"]["cache_mb"] * 2**20, color=QUIET, lw=0.8, ls=(0, (3, 3)))
        axis.annotate(
            "last cache",
            (result["machine"]["cache_mb"] * 2**20, 0),
            (4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7.5,
            color=QUIET,
        )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(which="major")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _bytes(v)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        io = "read g" if moved == 1 else "read g, update g"
        axis.set_title(f"{situation[0].upper()}{situation[1:]} (must move: {io})")
        axis.set_xlabel("gradients")
    axes[0].set_ylabel("GB/s of the bytes that must move")
    handles, _ = axes[0].get_legend_handles_labels()
    _frame(figure, result, "How much of the memory's speed is reached", handles=handles)
    return figure


def _name_points(axis: Axes, rows: list[dict[str, Any]], moved: int) -> None:
    for r in rows:
        speed = moved * r["grad_bytes"] / r["device_ms"]["p50"] / 1e6
        axis.annotate(
            r["name"],
            (r["grad_bytes"], speed),
            (0, -11),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            color=QUIET,
        )


def _size(row: dict[str, Any]) -> int:
    return row["grad_bytes"]


# Growth: cost against tensors, bytes, segments; memory against the model.


def growth(result: Result) -> Figure | None:
    """Four panels, log-log; the slope of a line is written at its end."""
    if not result["fits"]:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.2))
    titles = {
        "tensors": ("Number of tensors (256 elements each)", "tensors"),
        "bytes": ("Bytes of gradients (8 tensors, nothing to clip)", "gradients"),
        "segments": ("Number of segments (4096 tensors of 1024)", "segments"),
    }
    for axis, series in zip(axes.flat, AXES, strict=False):
        for contender in contenders_of(result, series):
            x, ms = curve(result, series, contender)
            axis.plot(x, ms, "o-", ms=4, lw=1.6, color=color_of(contender))
            _label_end(
                axis,
                x,
                ms,
                f"{label_of(contender)}{_slope(result, series, contender)}",
                color_of(contender),
            )
        title, label = titles[series]
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_ylabel("ms a call")
    _memory(axes[1, 1], result)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid()
        axis.margins(x=0.04)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for axis in (axes[0, 0], axes[1, 0]):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    for axis in (axes[0, 1], axes[1, 1]):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _bytes(v)))
    axes[1, 1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: _bytes(v)))
    _frame(figure, result, "How the cost of guarding grows")
    figure.subplots_adjust(left=0.06, right=0.85, wspace=0.6, hspace=0.36)  # room for the labels
    return figure


def _memory(axis: Axes, result: Result) -> None:
    evenly = [m for m in result["memory"] if " MB fp32" in m["case"]]
    for contender in dict.fromkeys(m["contender"] for m in evenly):
        points = sorted(
            (m["grad_bytes"], max(m["working_bytes"], 1))
            for m in evenly
            if m["contender"] == contender
        )
        x, y = np.array(points, dtype=float).T
        axis.plot(x, y, "o-", ms=4, lw=1.6, color=color_of(contender))
        _label_end(axis, x, y, label_of(contender), color_of(contender))
    axis.axhline(16e6, color=QUIET, lw=0.8, ls=(0, (3, 3)))
    axis.set_title("Working memory beyond the gradients")
    axis.set_xlabel("gradients")
    axis.set_ylabel("peak of a call")


def _slope(result: Result, series: str, contender: str) -> str:
    for fit in result["fits"]:
        if (fit["series"], fit["contender"]) == (series, contender):
            return f"\n{_two_digits(fit['slope'])} {fit['unit']}"
    return ""


def _two_digits(value: float) -> str:
    """Without an exponent."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _label_end(axis: Axes, x: np.ndarray, y: np.ndarray, text: str, color: str) -> None:
    axis.annotate(
        text,
        (x[-1], y[-1]),
        (7, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=color,
        annotation_clip=False,
    )


# What all charts share.


def _frame(
    figure: Figure,
    result: Result,
    title: str,
    *,
    handles: Sequence[Any] = (),
) -> None:
    """Title, legend under it, and at the foot where the numbers come from."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", va="top")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.005, 1 - 0.42 / height),
            ncols=len(handles),
            fontsize=8.5,
            handlelength=1.2,
            columnspacing=1.6,
        )
    figure.text(0.012, 0.1 / height, source_of(result), fontsize=7.5, color=QUIET)
    top = 1 - (0.78 if handles else 0.5) / height
    figure.tight_layout(rect=(0.005, 0.3 / height, 0.985, top))


def source_of(result: Result) -> str:
    """Machine, versions, commit, date, command: one line."""
    found = result["versions"]
    commit = f" at {result['commit']}" if result["commit"] else ""
    return " · ".join(
        (
            f"{title_of(result['machine'])} ({result['machine']['capability']})",
            f"torch {found['torch']}",
            f"fastguard {found['fastguard']}{commit}",
            result["date"][:10],
            "median and p20..p80 of interleaved rounds",
            result["command"],
        )
    )


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size * 0.9995:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.plots FILE.json")
    source = Path(sys.argv[1])
    for drawn in draw(source, source.parent):
        print(drawn)
