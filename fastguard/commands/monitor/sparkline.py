"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"

LOG_FROM = 100.0
"""From this ratio of largest to smallest on, the scale is logarithmic."""


T = TypeVar("T")


def shares(values: Sequence[T], width: int) -> list[Sequence[T]]:
    """The values in at most `width` parts of the same length, or nearly.

    Example:
        >>> shares([1, 2, 3, 4, 5], 2)
        [[1, 2], [3, 4, 5]]
    """
    n = min(width, len(values))
    return [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """At most `width` characters, one for the largest finite value of each equal share.

    A share without a finite value is `"!"`: it was all NaN or Inf.

    Args:
        values: Oldest first.
        width: Characters.
        bars: From low to high.

    Example:
        >>> sparkline([1, 2, 3, 4, float("nan"), 8], 6)
        '▁▂▃▄!█'
    """
    tops = [max(filter(math.isfinite, s), default=math.nan) for s in shares(values, width)]
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
    """The linear scale; the span from the least to the largest float is twice the largest."""
    return value / 2
