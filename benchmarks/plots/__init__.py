"""Draws the charts of a result file: `python -m benchmarks.plots FILE.json`.

The footer of each chart names the machine, versions, commit and date, and the command that
reproduces it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.plots.growth import growth
from benchmarks.plots.look import STYLE
from benchmarks.plots.look import source_of as source_of
from benchmarks.plots.ratios import ratios
from benchmarks.plots.roofline import roofline
from benchmarks.plots.steps import steps
from fastguard.commands.bench.results import load


def draw(result_file: Path, folder: Path) -> list[Path]:
    """Draws every chart for which the result has data, as PNG and SVG.

    Returns:
        The written files.
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
