"""How the cost grows with the number of tensors, bytes and segments.

Expected results: the cost is linear in bytes, at memory bandwidth. The cost per tensor is a
fraction of torch's cost, and zero with trusted flat buckets. A segment costs a few microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastguard.commands.bench.results import Result
from fastguard.commands.bench.table import rich_parts
from fastguard.commands.bench.workload import Case, Shape

TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000)
MEGABYTES = (1, 4, 16, 64, 256, 1024, 4096)
SEGMENTS = (1, 4, 16, 64, 256, 1024, 4096)
SMALL: Shape = (256,)
SECONDS = 0.5  # duration per point

# series -> key of a row for the axis, unit of the slope, factor from ms to that unit
AXES: dict[str, tuple[str, str, float]] = {
    "tensors": ("tensors", "µs per tensor", 1e3),
    "bytes": ("grad_bytes", "ms per GB", 1e9),
    "segments": ("segments", "µs per segment", 1e3),
}


def growth_cases(device: torch.device) -> list[Case]:
    """Returns the cases of all curves."""
    variants = ("torch foreach", "fastguard", "fastguard flat", "fastguard flat trusted")
    measures = ("fastguard measure", "fastguard measure flat")
    return [
        *(Case(f"{n} x 256", [SMALL] * n, variants, series="tensors") for n in TENSORS),
        *(
            Case(f"{mb} MB", [(mb * 2**15,)] * 8, ("torch foreach", "fastguard"), series="bytes")
            for mb in MEGABYTES
        ),
        *(
            Case(
                "4096 x 1k",
                [(1024,)] * 4096,
                measures,
                "fastguard measure",
                segments=n,
                series="segments",
            )
            for n in SEGMENTS
        ),
    ]


def fits(result: Result) -> list[dict[str, Any]]:
    """Fits a line to each curve.

    The line `ms = start + slope * x` minimizes relative errors. The exponent of `ms = c * x^e` is
    fitted to the larger half of the curve: 1 is linear, 0 is constant.
    """
    found = []
    for series in AXES:
        for contender in contenders_of(result, series):
            x, ms = curve(result, series, contender)
            if len(x) < 3:
                continue
            _, unit, scale = AXES[series]
            slope, start = np.polyfit(x, ms, 1, w=1.0 / ms)
            late = slice(len(x) // 2, None)
            exponent = np.polyfit(np.log(x[late]), np.log(ms[late]), 1)[0]
            found.append(
                {
                    "series": series,
                    "contender": contender,
                    "start_ms": float(start),
                    "slope": float(slope * scale),
                    "unit": unit,
                    "exponent": float(exponent),
                }
            )
    return found


def contenders_of(result: Result, series: str) -> list[str]:
    """Returns the contenders of a series, in order of appearance."""
    return list(dict.fromkeys(r["contender"] for r in result["rows"] if r["series"] == series))


def curve(result: Result, series: str, contender: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the axis and the milliseconds of a contender.

    On a GPU, these are host times for tensors and segments, and device times for bytes.
    """
    axis = AXES[series][0]
    clock = "device_ms" if series == "bytes" else "host_ms"
    points = [
        (row[axis], row[clock]["p50"])
        for row in result["rows"]
        if row["series"] == series and row["contender"] == contender
    ]
    x, ms = zip(*sorted(points), strict=True) if points else ((), ())
    return np.array(x, dtype=float), np.array(ms, dtype=float)


def growth_table(result: Result) -> Any:
    """The slopes of the growth curves."""
    box, table = rich_parts()
    t = table.Table(title="Growth", box=box.SIMPLE_HEAD, title_justify="left")
    t.add_column("cost against number of")
    t.add_column("contender")
    t.add_column("slope", justify="right")
    t.add_column("exponent", justify="right")
    for fit in result["fits"]:
        slope = f"{fit['slope']:.3g} {fit['unit']}"
        t.add_row(fit["series"], fit["contender"], slope, f"{fit['exponent']:.2f}")
    return t
