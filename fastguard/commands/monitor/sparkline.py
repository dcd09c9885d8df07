"""One-line text curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"

LOG_FROM = 100.0
"""Max/min ratio from which the scale is logarithmic."""


T = TypeVar("T")


def split_evenly(values: Sequence[T], width: int) -> list[Sequence[T]]:
    """Splits the values into at most `width` parts of nearly equal length.

    Example:
        >>> split_evenly([1, 2, 3, 4, 5], 2)
        [[1, 2], [3, 4, 5]]
    """
    n = min(width, len(values))
    return [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Draws at most `width` characters, each for the largest finite value of its part.

    The values are split evenly. A part without a finite value (all NaN or Inf) is drawn as `"!"`.

    Args:
        values: Oldest first.
        width: Number of characters.
        bars: Characters from low to high.

    Example:
        >>> sparkline([1, 2, 3, 4, float("nan"), 8], 6)
        '▁▂▃▄!█'
    """
    tops = [max(filter(math.isfinite, s), default=math.nan) for s in split_evenly(values, width)]
    finite = [top for top in tops if math.isfinite(top)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = math.log if low > 0 and high / low >= LOG_FROM else _half
    span = scale(high) - scale(low)

    def bar(top: float) -> str:
        if not math.isfinite(top):
            return "!"
        height = (scale(top) - scale(low)) / span if span else 0.0
        return bars[min(int(height * len(bars)), len(bars) - 1)]

    return "".join(map(bar, tops))


def _half(value: float) -> float:
    """A linear scale, halved so that the span between the largest floats does not overflow."""
    return value / 2
