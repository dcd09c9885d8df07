"""How the cost grows: with tensors, with bytes, with segments.

Expected: linear in bytes at the speed of memory; for each tensor a fraction of what torch takes,
nothing with trusted flat buckets; for each segment a few microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastguard.commands.bench.results import Result
from fastguard.commands.bench.workload import Case, Shape

TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000)
MEGABYTES = (1, 4, 16, 64, 256, 1024, 4096)
SEGMENTS = (1, 4, 16, 64, 256, 1024, 4096)
SMALL: Shape = (256,)
SECONDS = 0.5  # a point

# series -> the key of a row that is its axis, what a slope is counted in, and by what factor
AXES: dict[str, tuple[str, str, float]] = {
    "tensors": ("tensors", "µs a tensor", 1e3),
    "bytes": ("grad_bytes", "ms a GB", 1e9),
    "segments": ("segments", "µs a segment", 1e3),
}


def growth_cases(device: torch.device) -> list[Case]:
    """The points of all curves."""
    roads = ("torch foreach", "fastguard", "fastguard flat", "fastguard flat trusted")
    measures = ("fastguard measure", "fastguard measure flat")
    return [
        *(Case(f"{n} x 256", [SMALL] * n, roads, series="tensors") for n in TENSORS),
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
    """A line through each curve.

    `ms = start + slope * x`, with relative errors weighed alike, and the exponent of `ms = c * x^e`
    over the larger half of the curve: 1 is linear, 0 is flat.
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
    """Who is in a series, in order of appearance."""
    return list(dict.fromkeys(r["contender"] for r in result["rows"] if r["series"] == series))


def curve(result: Result, series: str, contender: str) -> tuple[np.ndarray, np.ndarray]:
    """The axis and the milliseconds of one contender: on a GPU the host's for tensors and
    segments, the device's for bytes.
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
