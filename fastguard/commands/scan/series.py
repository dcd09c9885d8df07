"""Judges the losses and gradient norms of structured logs as a guard would.

Spikes are found by fastguard's own `SpikeRule`, applied value by value, so the output "SpikeRule(
sigma=6) would have skipped step 15" is exact. A loss grows if it ends well above its lowest level,
and has been climbing since that level or never returned to it. Memory does not depend on the length
of the log.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fastguard.commands.scan.columns import is_grad_norm, is_loss, is_rival
from fastguard.commands.scan.reading import Place
from fastguard.stages.formulas import TINY
from fastguard.stages.spike_rules import SpikeRule

RULE = SpikeRule(window=32, sigma=6.0, warmup=8)
"""The window is shorter than the default, since many logs contain only every tenth step."""

KEPT = 100
"""Maximum number of spikes kept per series; further spikes are only counted."""

NAMES = 64
"""Maximum number of series that are judged."""

POINTS = 512
"""Maximum number of points per series for judging growth; longer series are averaged in pairs."""

NOISE = 20
"""Number of values from which spikes must be above the threshold to raise an alarm.

Losses and gradient norms are heavy-tailed: with log-normal noise of 0.4, half of the series of 500
values have one above 6 sigma of its window. So a spike must be 1.5 times as far above the mean as
the threshold is in 200 values, and 0.5 more for each further factor of 10.
"""

LONG = 10_000
"""Number of values from which such spikes must also be rarer than one in `RARE` values, or
one of them must exceed four times the fourth highest spike."""

RARE = 2000

MIN_POINTS = 12
"""Minimum number of points from which growth is judged."""


class Spike(NamedTuple):
    """A value that the rule would have skipped.

    Attributes:
        line: Line number.
        place: Place in the run.
        value: The logged value.
        threshold: The largest value that would have been accepted.
    """

    line: int
    place: Place
    value: float
    threshold: float


class Growth(NamedTuple):
    """A loss that climbs.

    Attributes:
        line, place: Where the loss was lowest.
        low: Lowest level, a running median.
        end: Final level.
    """

    line: int
    place: Place
    low: float
    end: float


@dataclass(slots=True)
class Series:
    """One loss or gradient norm.

    Args:
        name: Name of the column or key.

    Attributes:
        spikes: The first `KEPT` spikes.
        n_spikes: Number of spikes.
        largest: The spike that is farthest above its threshold.
    """

    name: str
    spikes: list[Spike] = field(default_factory=list)
    n_spikes: int = 0
    largest: Spike | None = None
    _n: int = 0
    _zero_at: int = -2 * RULE.window - 1  # index of the last value that is zero
    _highest: list[float] = field(default_factory=list)  # the four highest spikes, in order
    _heights: list[int] = field(default_factory=lambda: [0] * 16)
    _ring: deque[float] = field(default_factory=lambda: deque(maxlen=RULE.window))
    _in_a_row: int = 0
    _points: list[tuple[int, Place, float]] = field(default_factory=list)
    _group: tuple[int, Place] | None = None
    _pending: list[float] = field(default_factory=list)
    _stride: int = 1

    def take(self, line: int, place: Place, value: float) -> bool:
        """Adds the next value, which must be finite; returns whether it is a spike."""
        ring = self._ring
        threshold = math.inf
        if not value:
            self._zero_at = self._n
        # None of n values exceeds mean + sqrt(n - 1) * std, and sqrt(31) < 6. So a value that is
        # not above the whole window is not a spike.
        if len(ring) >= RULE.warmup and value > max(ring):
            threshold = threshold_of(ring)
        exceeds = value > threshold
        spike = exceeds and self._in_a_row < RULE.window
        self._in_a_row = self._in_a_row + 1 if exceeds else 0
        if spike:
            self._take_spike(Spike(line, place, value, threshold))
        if value or not is_grad_norm(self.name):
            ring.append(threshold if spike else value)
        self._keep([line], lambda _: place, [value], 0, 1)
        return spike

    def _take_spike(self, spike: Spike) -> None:
        self.n_spikes += 1
        if len(self.spikes) < KEPT:
            self.spikes.append(spike)
        mean = sum(self._ring) / len(self._ring)
        height = (spike.value - mean) / (spike.threshold - mean)
        if self._n - self._zero_at > 2 * RULE.window:  # zeros give no scale
            self._heights[int(min(4 * height, len(self._heights) + 3)) - 4] += 1
        self._highest = sorted([*self._highest, spike.value])[-4:]
        if self.largest is None or spike.value / spike.threshold > (
            self.largest.value / self.largest.threshold
        ):
            self.largest = spike

    @property
    def alarms(self) -> bool:
        """Whether the spikes are more than noise explains."""
        if not any(self._heights[int(2 * math.log10(max(1, self._n / NOISE))) :]):
            return False
        if self._n < LONG:
            return True
        n = sum(self._heights[int(math.log10(self._n / LONG)) + 2 :])
        return n <= max(3, self._n // RARE) or self._highest[-1] > 4 * self._highest[0]

    def take_all(
        self, lines: Sequence[int], place: Callable[[int], Place], values: Sequence[float]
    ) -> int:
        """Adds values as repeated calls of `take` would, in a tenth of the time.

        Args:
            lines: The line numbers of the values.
            place: Returns the place of the value at an index.
            values: The values, all finite.

        Returns:
            The number of values that had to be compared with a threshold individually.
        """
        alone = 0
        begin, n = 0, len(values)
        one_by_one = n if n < MIN_POINTS or 0.0 in values else RULE.warmup - len(self._ring)
        while begin < one_by_one:
            self.take(lines[begin], place(begin), values[begin])
            begin, alone = begin + 1, alone + 1
        if begin == n:
            return alone
        known = len(self._ring) - begin
        window = [*self._ring, *values[begin:]]
        padded = np.array([-np.inf] * (RULE.window - len(self._ring)) + window)
        for at in (_may_exceed(padded) + begin).tolist():
            alone += 1
            before = window[max(0, known + at - RULE.window) : known + at]
            if at < begin or values[at] <= threshold_of(before):
                continue
            self._slide(lines, place, values, begin, at)
            begin, calm = at, 0
            # while the window contains a threshold instead of a value
            while begin < n and calm < RULE.window:
                spike = self.take(lines[begin], place(begin), values[begin])
                begin, calm, alone = begin + 1, 0 if spike else calm + 1, alone + 1
        self._slide(lines, place, values, begin, n)
        return alone

    def _slide(
        self,
        lines: Sequence[int],
        place: Callable[[int], Place],
        values: Sequence[float],
        begin: int,
        end: int,
    ) -> None:
        """Adds values that contain no spike."""
        if begin < end:
            self._ring.extend(values[max(begin, end - RULE.window) : end])
            self._in_a_row = 0
            self._keep(lines, place, values, begin, end)

    def growth(self) -> Growth | None:
        """The growth of the series up to the end of the log, or None."""
        if not is_loss(self.name) or is_rival(self.name):
            return None
        points = self._points
        n = len(points)
        if n < MIN_POINTS:
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
        if low == 0:  # a loss that was off, or rounded to zero, gives no scale
            return None
        if len(tail) < max(MIN_POINTS // 2, n // 10) or not rise > 0.25 * scale:
            return self._end_of_long(values)
        above = rise >= 0.5 * scale
        steady = _is_trend(values[low_at + 1 :])
        # To exclude the noise of a few points, all values of the later half must lie above all
        # values before the low.
        later, earlier = values[low_at + len(tail) // 2 :], values[max(0, low_at - 2 * half - 4) :]
        stays = above and len(later) >= MIN_POINTS and min(later) > max(earlier[: 2 * half + 5])
        worse = n >= 20 and steady and begin > 0 and end >= 1.25 * begin
        if not ((above and (steady or stays)) or worse):
            return self._end_of_long(values)
        line, place, _ = points[low_at]
        return Growth(line, place, low, end)

    def _end_of_long(self, values: list[float]) -> Growth | None:
        """The growth within the last tenth of a long series, which averaging would hide."""
        n = len(values)
        level = median(values[n // 2 :])
        end = min(self._ring, default=level)
        low_at = max((i for i in range(n) if values[i] <= level), default=0)
        highest = max(values[n // 2 : low_at + 1], default=level)
        if self._stride == 1 or level <= 0 or end < 1.5 * level or end <= highest:
            return None
        line, place, _ = self._points[low_at]
        return Growth(line, place, level, median(self._ring))

    def _keep(
        self,
        lines: Sequence[int],
        place: Callable[[int], Place],
        values: Sequence[float],
        at: int,
        end: int,
    ) -> None:
        self._n += end - at
        while at < end:
            if not self._pending:
                self._group = (lines[at], place(at))
            taken = values[at : min(end, at + self._stride - len(self._pending))]
            self._pending += taken
            at += len(taken)
            if len(self._pending) < self._stride or self._group is None:
                return
            self._points.append((*self._group, sum(self._pending) / self._stride))
            self._pending.clear()
            if len(self._points) == 2 * POINTS:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(line, at, (a + b) / 2) for (line, at, a), (_, _, b) in pairs]
                self._stride *= 2


def threshold_of(window: Collection[float]) -> float:
    """The threshold of `RULE` for the next value."""
    n = len(window)
    mean = sum(window) / n
    std = math.sqrt(sum([(x - mean) * (x - mean) for x in window]) / n)
    return mean + RULE.sigma * max(std, 0.01 * abs(mean), TINY)


def _may_exceed(padded: np.ndarray) -> np.ndarray:
    """The indices of all values that exceed their threshold, and of few others.

    Args:
        padded: The window before the first value, with -inf for missing ones, and the values.
    """
    windows = sliding_window_view(padded, RULE.window)[:-1]
    values = padded[RULE.window :]
    at = np.flatnonzero(values > windows.max(axis=1))
    windows = windows[at]
    with np.errstate(all="ignore"):
        mean = windows.mean(axis=1)
        std = np.maximum(windows.std(axis=1), np.maximum(0.01 * abs(mean), TINY))
        threshold = mean + RULE.sigma * std
        rounding = 1e-9 * (abs(mean) + abs(threshold))
        # NaN, which a window with -inf gives, is kept
        return at[~(values[at] < threshold - rounding)]


def _is_trend(values: list[float]) -> bool:
    """Whether values trend upward, by the Mann-Kendall test: z > 3 and tau > 0.4."""
    values = values[:: max(1, len(values) // 100)]
    n = len(values)
    if n < MIN_POINTS // 2:
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
        """Whether values of this name are judged."""
        known = self._judged.get(name)
        if known is None:
            known = is_loss(name) or is_grad_norm(name)
            if len(self._judged) < 4096:
                self._judged[name] = known
        return known

    def take(self, name: str, line: int, place: Place, value: float) -> None:
        """Adds a finite value of a judged series."""
        if (series := self._of(name)) is not None:
            series.take(line, place, value)

    def take_all(
        self,
        name: str,
        lines: Sequence[int],
        place: Callable[[int], Place],
        values: Sequence[float],
    ) -> int:
        """Adds finite values of a judged series; see `Series.take_all`."""
        series = self._of(name)
        return 0 if series is None else series.take_all(lines, place, values)

    def _of(self, name: str) -> Series | None:
        series = self._series.get(name)
        if series is None and len(self._series) < NAMES:
            series = self._series[name] = Series(name)
        return series

    def found(self) -> list[tuple[Series, Growth | None]]:
        """The series with spikes or growth."""
        judged = ((series, series.growth()) for series in self._series.values())
        return [(series, growth) for series, growth in judged if series.n_spikes or growth]
