"""Losses and gradient norms of a log that is data, judged as a guard would have judged them.

Spikes: fastguard's own `SpikeRule`, value by value, so that "SpikeRule(sigma=6) would have skipped
step 15" is what it says. Growth: a loss that ends well above its lowest level and has been climbing
since, or has never come back. Memory does not depend on the length of the log.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from fastguard.commands.scan.columns import is_grad_norm, is_loss
from fastguard.commands.scan.reading import Place
from fastguard.stages.formulas import TINY
from fastguard.stages.spike_rules import SpikeRule

RULE = SpikeRule(window=32, sigma=6.0, warmup=8)
"""Shorter than the default: a log holds every tenth step or less, and many logs are short."""

KEPT = 100
"""Spikes of a series that are told; the others are counted."""

NAMES = 64
"""Series that are judged."""

POINTS = 2048
"""Points of a series that growth is judged by; a longer one is averaged in pairs."""

FEWEST = 12
"""Points that growth takes at least."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A value that the rule would have skipped.

    Attributes:
        line: Its line.
        place: Its place.
        value: What was logged.
        threshold: The largest value that would have been accepted.
    """

    line: int
    place: Place
    value: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Growth:
    """A loss that climbs.

    Attributes:
        line, place: Where it was lowest.
        low: Its lowest level, a running median.
        end: Its level at the end.
    """

    line: int
    place: Place
    low: float
    end: float


@dataclass(slots=True)
class Series:
    """One loss or gradient norm.

    Args:
        name: Of the column or key.

    Attributes:
        spikes: The first `KEPT` of them.
        n_spikes: How many there are.
    """

    name: str
    spikes: list[Spike] = field(default_factory=list)
    n_spikes: int = 0
    _ring: deque[float] = field(default_factory=lambda: deque(maxlen=RULE.window))
    _in_a_row: int = 0
    _points: list[tuple[int, Place, float]] = field(default_factory=list)
    _pending: list[tuple[int, Place, float]] = field(default_factory=list)
    _stride: int = 1

    def take(self, line: int, place: Place, value: float) -> None:
        """Takes the next value, which must be finite."""
        ring = self._ring
        threshold = math.inf
        # Of n values none exceeds mean + sqrt(n - 1) * std, and sqrt(31) < 6: what is not above all
        # of the window is no spike.
        if len(ring) >= RULE.warmup and value > max(ring):
            threshold = threshold_of(ring)
        exceeds = value > threshold
        spike = exceeds and self._in_a_row < RULE.window
        self._in_a_row = self._in_a_row + 1 if exceeds else 0
        if spike:
            self.n_spikes += 1
            if len(self.spikes) < KEPT:
                self.spikes.append(Spike(line, place, value, threshold))
        if value or not is_grad_norm(self.name):
            ring.append(threshold if spike else value)
        self._keep(line, place, value)

    def growth(self) -> Growth | None:
        """How it climbs to the end of the log, or None if it does not."""
        if not is_loss(self.name):
            return None
        points = self._points
        n = len(points)
        if n < FEWEST:
            return None
        values = [value for _, _, value in points]
        half = max(2, n // 40)
        smooth = [median(values[max(0, i - half) : i + half + 1]) for i in range(n)]
        tenth = max(3, n // 10)
        begin, end = median(values[:tenth]), median(values[-tenth:])
        low_at = min(reversed(range(n)), key=smooth.__getitem__)
        low, tail = smooth[low_at], smooth[low_at:]
        scale = low if low > 0 else max(smooth[: n // 2 + 1]) - low
        rise = end - low
        if len(tail) < max(FEWEST // 2, n // 10) or not rise > 0.25 * scale:
            return None
        above = rise >= 0.5 * scale
        steady = _is_trend(values[low_at + 1 :])
        # Not the noise of a few points: all of the later half lie above all that led to the low.
        later, earlier = values[low_at + len(tail) // 2 :], values[max(0, low_at - 2 * half - 4) :]
        stays = above and len(later) >= FEWEST and min(later) > max(earlier[: 2 * half + 5])
        worse = n >= 20 and steady and begin > 0 and end >= 1.25 * begin
        if not ((above and (steady or stays)) or worse):
            return None
        line, place, _ = points[low_at]
        return Growth(line, place, low, end)

    def _keep(self, line: int, place: Place, value: float) -> None:
        if self._stride == 1:
            self._points.append((line, place, value))
        else:
            self._pending.append((line, place, value))
            if len(self._pending) < self._stride:
                return
            first_line, first_place, _ = self._pending[0]
            mean = sum(value for _, _, value in self._pending) / self._stride
            self._points.append((first_line, first_place, mean))
            self._pending.clear()
        if len(self._points) == 2 * POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(line, at, (a + b) / 2) for (line, at, a), (_, _, b) in pairs]
            self._stride *= 2


def threshold_of(window: deque[float]) -> float:
    """What `RULE` compares the next value with."""
    n = len(window)
    mean = sum(window) / n
    std = math.sqrt(sum((x - mean) * (x - mean) for x in window) / n)
    return mean + RULE.sigma * max(std, 0.01 * abs(mean), TINY)


def _is_trend(values: list[float]) -> bool:
    """Whether values rise in their order, by the test of Mann and Kendall: z > 3, and tau > 0.4."""
    values = values[:: max(1, len(values) // 100)]
    n = len(values)
    if n < FEWEST // 2:
        return False
    order = sum(
        (later > earlier) - (later < earlier)
        for i, earlier in enumerate(values)
        for later in values[i + 1 :]
    )
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return order > 3 * deviation and order > 0.4 * n * (n - 1) / 2


class AllSeries:
    """The series of a log, by name."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self._judged: dict[str, bool] = {}

    def judges(self, name: str) -> bool:
        """Whether values of this name are a series that is judged."""
        known = self._judged.get(name)
        if known is None:
            known = is_loss(name) or is_grad_norm(name)
            if len(self._judged) < 4096:
                self._judged[name] = known
        return known

    def take(self, name: str, line: int, place: Place, value: float) -> None:
        """Takes a finite value of a series that is judged."""
        series = self._series.get(name)
        if series is None:
            if len(self._series) >= NAMES:
                return
            series = self._series[name] = Series(name)
        series.take(line, place, value)

    def found(self) -> list[tuple[Series, Growth | None]]:
        """The series with spikes or growth."""
        judged = ((series, series.growth()) for series in self._series.values())
        return [(series, growth) for series, growth in judged if series.n_spikes or growth]
