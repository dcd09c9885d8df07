"""`AutoClip`: an adaptive limit that is a percentile of the previous norms."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastguard.errors.checked_numbers import count_of, number_of
from fastguard.stages.limit_rules import (
    LARGEST_WINDOW,
    AdaptiveLimit,
    LimitStep,
    Numbers,
    Undo,
    set_number,
)


@dataclass(frozen=True)
class AutoClip(AdaptiveLimit):
    """Clips to a percentile of the previous norms (Seetharaman et al. 2020, arXiv 2007.14469).

    The limit is the `percentile` of the last `window` norms including the current one, with linear
    interpolation. The paper keeps all norms of a run; to do the same, choose a `window` of at least
    the number of steps.

    Args:
        percentile: From 0 to 100; the paper recommends 10. Default: 10.
        window: Number of norms that are kept, with 16 bytes each; at most 2**20. Default: 10,000.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of range.

    Example:
        >>> AutoClip().percentile
        10.0
    """

    percentile: float = 10.0
    window: int = 10_000

    def __post_init__(self) -> None:
        percentile = number_of("AutoClip percentile", self.percentile, "use a number up to 100")
        if not 0 <= percentile <= 100:  # this form of the comparison also rejects NaN
            raise ValueError(
                f"AutoClip percentile={self.percentile!r} must be a number from 0 to 100"
            )
        set_number(self, "percentile", percentile)
        count_of("AutoClip window", self.window, 1, LARGEST_WINDOW)

    @property
    def initial(self) -> Sequence[float]:  # type: ignore[override]
        """A ring of the norms in order of arrival, then the sorted norms; `inf` marks free
        places.
        """
        return [math.inf] * (2 * self.window)

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """Returns the percentile of the norms, including the current one."""
        ordered = self._updated(norm, state, step)[1]
        last = (step.seen + 1).clamp(max=self.window) - 1
        place = last * (self.percentile / 100)
        low = place.floor()
        low_value = ordered.gather(0, low.long()[None])[0]
        high_value = ordered.gather(0, torch.minimum(low + 1, last).long()[None])[0]
        return low_value + (place - low) * (high_value - low_value)

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """Returns both lists with the oldest norm replaced with the current norm."""
        return torch.cat(self._updated(norm, state, step))

    def _updated(self, norm: Tensor, state: Tensor, step: LimitStep) -> tuple[Tensor, Tensor]:
        """Returns the ring and the sorted norms with the oldest norm replaced with the new norm.

        Each is float64 `(window, S)`.
        """
        arrived, ordered = state.split(self.window)
        at = (step.seen % self.window).long()[None]
        oldest = arrived.gather(0, at)  # this is inf while the ring is not full
        leaves = (ordered < oldest).sum(0)
        enters = (ordered < norm).sum(0) - (oldest < norm).long()[0]
        # Values after the removed one move down one place; values after the new one move up.
        k = torch.arange(self.window, device=norm.device)[:, None]
        source = k - (k > enters).long()
        source = (source + (source >= leaves).long()).clamp(max=self.window - 1)
        ordered = torch.where(k == enters, norm, ordered.gather(0, source))
        return arrived.scatter(0, at, norm[None]), ordered

    def on_host(self, norm: float, numbers: Numbers, learns: bool, undo: Undo) -> float:  # type: ignore[override]
        """Computes limit and update in Python floats: see `AdaptiveLimit.on_host`.

        Takes two binary searches, and shifts the sorted norms between the place that is freed and
        the place that is filled.
        """
        count, window = numbers[0], self.window
        seen = int(count)
        start, at = 1 + window, 1 + seen % window
        oldest = numbers[at]  # this is inf while the ring is not full
        if seen < window:
            last, leaves = seen, start + seen
            enters = bisect_left(numbers, norm, start, leaves)
        else:
            last = window - 1
            leaves = bisect_left(numbers, oldest, start)
            if oldest < norm:
                enters = bisect_left(numbers, norm, leaves) - 1
            else:
                enters = bisect_left(numbers, norm, start, leaves)
        if undo is not None:
            undo.append(partial(self._restore, numbers, count, at, oldest))
        # The limit includes this norm, so the lists are updated even if it is not learned.
        _move(numbers, leaves, enters)
        numbers[enters] = numbers[at] = norm
        numbers[0] = count + 1.0
        place = last * (self.percentile / 100)
        low = int(place)
        value = numbers[start + low]
        if low < last:
            value += (place - low) * (numbers[start + low + 1] - value)
        if not learns:
            _move(numbers, enters, leaves)
            numbers[leaves] = numbers[at] = oldest
            numbers[0] = count
        return value

    def _restore(self, numbers: Numbers, seen: float, at: int, oldest: float) -> None:
        """Restores the ring and sorts it again, which is correct after an interrupt at any line."""
        numbers[0], numbers[at] = seen, oldest
        both = np.asarray(numbers)
        both[1 + self.window :] = np.sort(both[1 : 1 + self.window])


def _move(numbers: Numbers, source: int, target: int) -> None:
    """Moves the numbers between two indices by one place, from the target to the source."""
    if target < source:
        numbers[target + 1 : source + 1] = numbers[target:source]
    elif target > source:
        numbers[source:target] = numbers[source + 1 : target + 1]
