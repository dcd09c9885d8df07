"""The roofline chart: achieved fraction of memory bandwidth."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.plots.look import INK, QUIET, bytes_of, color_of, frame, label_of
from fastguard.commands.bench.results import Result


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
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: bytes_of(v)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        io = "read g" if moved == 1 else "read g, update g"
        axis.set_title(f"{situation[0].upper()}{situation[1:]} (must move: {io})")
        axis.set_xlabel("gradients")
    axes[0].set_ylabel("GB/s of the bytes that must move")
    handles, _ = axes[0].get_legend_handles_labels()
    frame(figure, result, "How much of the memory's speed is reached", handles=handles)
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
