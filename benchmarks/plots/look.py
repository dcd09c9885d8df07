"""Shared by all charts: colors, labels, title, legend, and the footer with the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fastguard.commands.bench.machine import title_of
from fastguard.commands.bench.results import Result

INK, QUIET, FAINT = "#1f2933", "#6b7785", "#d9dfe5"
COLORS = {
    "fastguard": "#0b7a75",
    "fastguard flat": "#35b0a2",
    "fastguard flat trusted": "#8fd9c4",
    "fastguard measure": "#0b7a75",
    "fastguard measure flat": "#35b0a2",
    "GuardedOptimizer": "#0b7a75",
    "GuardedOptimizer flat": "#35b0a2",
    "GuardedOptimizer flat parameters": "#8fd9c4",
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
    "GuardedOptimizer flat parameters": "GuardedOptimizer, flat parameters",
}
SHORT = {
    "fastguard flat": "flat buckets",
    "fastguard flat trusted": "trusted buckets",
    "isfinite + clip": "isfinite, torch",
}
"""Shorter labels for the end of a line, where there is little room."""

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
    "svg.hashsalt": "fastguard",  # makes SVG files reproducible
}


def color_of(contender: str) -> str:
    return COLORS.get(contender, QUIET)


def label_of(contender: str) -> str:
    return LABELS.get(contender, contender)


def short_label_of(contender: str) -> str:
    return SHORT.get(contender, label_of(contender))


def frame(
    figure: Figure,
    result: Result,
    title: str,
    *,
    handles: Sequence[Any] = (),
    legend_rows: int = 1,
) -> None:
    """Adds the title, a legend below it, and the source as a footer."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", va="top")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.005, 1 - 0.42 / height),
            ncols=-(-len(handles) // legend_rows),
            fontsize=8.5,
            handlelength=1.2,
            columnspacing=1.6,
        )
    figure.text(0.012, 0.1 / height, source_of(result), fontsize=7.5, color=QUIET)
    top = 1 - (0.58 + 0.2 * legend_rows if handles else 0.5) / height
    figure.tight_layout(rect=(0.005, 0.3 / height, 0.985, top))


def source_of(result: Result) -> str:
    """Returns machine, versions, commit, date and command as one line."""
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


def bytes_of(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size * 0.9995:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"
