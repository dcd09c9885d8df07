"""The chart of growth: cost by tensors, bytes and segments; memory by model size."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.growth import AXES, contenders_of, curve
from benchmarks.plots.labels import Label, label_ends
from benchmarks.plots.look import QUIET, bytes_of, color_of, frame, short_label_of
from fastguard.commands.bench.results import Result


def growth(result: Result) -> Figure | None:
    """Draws four log-log panels; the slope of each line is written at its end."""
    if not result["fits"]:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.2))
    titles = {
        "tensors": ("Number of tensors (256 elements each)", "tensors"),
        "bytes": ("Bytes of gradients (8 tensors, nothing to clip)", "gradients"),
        "segments": ("Number of segments (4096 tensors of 1024)", "segments"),
    }
    ends: dict[Axes, list[Label]] = {}
    for axis, series in zip(axes.flat, AXES, strict=False):
        for contender in contenders_of(result, series):
            x, ms = curve(result, series, contender)
            axis.plot(x, ms, "o-", ms=4, lw=1.6, color=color_of(contender))
            text = f"{short_label_of(contender)}{_slope(result, series, contender)}"
            ends.setdefault(axis, []).append(Label(x[-1], ms[-1], text, color_of(contender)))
        title, label = titles[series]
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_ylabel("ms per call")
    ends[axes[1, 1]] = _memory(axes[1, 1], result)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid()
        axis.margins(x=0.04)
        axis.xaxis.set_minor_locator(NullLocator())
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,))
        )
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for axis in (axes[0, 0], axes[1, 0]):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    for axis in (axes[0, 1], axes[1, 1]):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: bytes_of(v)))
    axes[1, 1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: bytes_of(v)))
    frame(figure, result, "How the cost of guarding grows")
    # leaves room for the labels
    figure.subplots_adjust(left=0.07, right=0.86, wspace=0.55, hspace=0.36)
    for axis, labels in ends.items():
        label_ends(axis, labels)
    return figure


def _memory(axis: Axes, result: Result) -> list[Label]:
    ends = []
    evenly = [m for m in result["memory"] if " MB fp32" in m["case"]]
    for contender in dict.fromkeys(m["contender"] for m in evenly):
        points = sorted(
            (m["grad_bytes"], max(m["working_bytes"], 1))
            for m in evenly
            if m["contender"] == contender
        )
        x, y = np.array(points, dtype=float).T
        axis.plot(x, y, "o-", ms=4, lw=1.6, color=color_of(contender))
        ends.append(Label(x[-1], y[-1], short_label_of(contender), color_of(contender)))
    axis.axhline(16e6, color=QUIET, lw=0.8, ls=(0, (3, 3)))
    axis.set_title("Working memory beyond the gradients")
    axis.set_xlabel("gradients")
    axis.set_ylabel("peak of a call")
    return ends


def _slope(result: Result, series: str, contender: str) -> str:
    for fit in result["fits"]:
        if (fit["series"], fit["contender"]) == (series, contender):
            return f"\n{_two_digits(fit['slope'])} {AXES[series][1]}"
    return ""


def _two_digits(value: float) -> str:
    """Formats two digits without an exponent."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
