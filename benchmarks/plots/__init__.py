"""The charts, drawn from a result file and nothing else: `python -m benchmarks.plots FILE.json`.

Every chart says at its foot which machine, versions, commit and date it shows, and the command that
makes it again.
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
