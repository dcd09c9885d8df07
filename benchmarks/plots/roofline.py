"""The roofline chart: achieved fraction of memory bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.plots.labels import Label, name_points
from benchmarks.plots.look import INK, QUIET, bytes_of, color_of, frame, label_of
from fastguard.commands.bench.results import Result

CONTENDERS = ("torch foreach", "fastguard", "fastguard flat")
NAMES = tuple(map(label_of, CONTENDERS))


def roofline(result: Result) -> Figure | None:
    """Draws the bytes that a case must move per time, and the measured bandwidth."""
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
        for contender in CONTENDERS:
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
        axis.margins(x=0.1)
        axis.grid(which="major")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: bytes_of(v)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        io = "read g" if moved == 1 else "read g, update g"
        axis.set_title(f"{situation[0].upper()}{situation[1:]} (must move: {io})")
        axis.set_xlabel("gradients")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low / 2, high)  # leaves room for the lowest name
    axes[0].set_ylabel("GB/s of the bytes that must move")
    handles, _ = axes[0].get_legend_handles_labels()
    frame(figure, result, "How much of the memory's speed is reached", handles=handles)
    shown = [line.get_xydata() for line in axes[0].get_lines() if line.get_label() in NAMES]
    name_points(figure, axes[0], _names(rows), np.concatenate(shown))
    return figure


def _names(rows: list[dict[str, Any]]) -> list[Label]:
    """Returns the name of each model or list, for a label below its slowest point."""
    slowest: dict[tuple[str, int], float] = {}
    for r in rows:
        shown = r["contender"] in CONTENDERS and not (r["series"] or r["cold"])
        if shown and r["situation"] == "nothing to clip":
            key, speed = (r["name"], r["grad_bytes"]), r["grad_bytes"] / r["device_ms"]["p50"] / 1e6
            slowest[key] = min(speed, slowest.get(key, speed))
    return [Label(size, speed, name) for (name, size), speed in slowest.items()]


def _size(row: dict[str, Any]) -> int:
    return row["grad_bytes"]
