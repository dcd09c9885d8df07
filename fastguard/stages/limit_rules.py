"""Limits of the gradient norm that follow the norms of a run: `ZClip`, `AutoClip`, `AdaGC`.

Each rule is two formulas, on tensors: the limit of a step from its norm and a few numbers, and what
these numbers are after a step that reached the weights. The three rules here have the same formulas
in Python floats as well (`on_host`), for one segment on a CPU, where an operation on a tensor of
one number costs more than the whole rule.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguard.errors.checked_numbers import count_of, number_of

Undo = list[Callable[[], object]] | None
if TYPE_CHECKING:
    Numbers = memoryview[float]
else:  # it cannot be subscripted before Python 3.14
    Numbers = memoryview
LARGEST_WINDOW = 2**20
"""Norms that `AutoClip` keeps: 16 MB per segment."""


class LimitStep(NamedTuple):
    """What a rule knows of a step besides the norms of the segments.

    Attributes:
        total_norm: float64 `()`: the norm of the whole model.
        seen: float64 `(S,)`: how many norms of each segment the rule has learned so far.
    """

    total_norm: Tensor
    seen: Tensor


class AdaptiveLimit:
    """A rule that sets `max_norm` anew at each step; derive from it to write one.

    A segment is what one clip coefficient belongs to (`clip_scope`). The guard keeps the numbers of
    a rule, saves them in `state_dict`, and takes them back with a step that fails.

    Attributes:
        initial: What a segment's N numbers are before the first step.

    Example:
        >>> class TwiceTheMean(AdaptiveLimit):
        ...     initial = (0.0,)
        ...
        ...     def limit(self, norm, state, step):
        ...         return torch.where(step.seen < 10, 1.0, 2 * state[0])
        ...
        ...     def learn(self, norm, state, step):
        ...         return [state[0] + (norm - state[0]) / (step.seen + 1)]
    """

    initial: Sequence[float] = ()

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """The limit of each segment.

        Args:
            norm: float64 `(S,)`: the norms of this step, of finite elements.
            state: float64 `(N, S)`: the rule's numbers.
            step: What else is known.

        Returns:
            float64 `(S,)`; `inf` or NaN: this segment is not clipped.
        """
        raise NotImplementedError

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor | Sequence[Tensor]:
        """The numbers after this step: N rows of `(S,)`.

        They are taken where the step reached the weights and the norm is above zero; a NaN among
        them is not. The arguments are those of `limit`.
        """
        raise NotImplementedError

    on_host: Callable[[float, Numbers], tuple[float, Callable[[Undo], None]]] | None = None
    """The limit of one segment from its norm and `(seen, *numbers)`, and what learns it; or None:
    there are only the formulas on tensors."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({settings})"


def _write(numbers: Numbers, values: Sequence[float], undo: Undo) -> None:
    """Replaces the first numbers; `undo` puts the old ones back, whenever it is called."""
    if undo is not None:
        undo.append(partial(_write, numbers, numbers[: len(values)].tolist(), None))
    for i, value in enumerate(values):
        numbers[i] = value


@dataclass(frozen=True)
class ZClip(AdaptiveLimit):
    """Clips norms that stand out of a moving average (Kumar et al. 2025, arXiv 2504.02507).

    With the moving mean m and standard deviation s of the norms n, a norm with n > m + z * s is
    clipped to

        m + z^2 * s^2 / (n - m)

    and enters the average with that value. The larger the spike, the closer to m it is clipped.

    Args:
        z: How many standard deviations above the mean is too much.
        alpha: Weight of the past in the moving averages.
        warmup: The averages begin with mean and variance of this many norms; until then, `max_norm`
            is the only limit.
        max_norm: A limit that always holds; None: there is none.

    Example:
        >>> ZClip(z=3.0).warmup
        25
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0

    initial = (0.0, 0.0)  # mean, variance

    def __post_init__(self) -> None:
        _set(self, "z", _positive("ZClip z", self.z))
        _set(self, "alpha", _fraction("ZClip alpha", self.alpha))
        count_of("ZClip warmup", self.warmup, 2, LARGEST_WINDOW)
        if self.max_norm is not None:
            _set(self, "max_norm", _positive("ZClip max_norm", self.max_norm))

    @property
    def _fixed(self) -> float:
        return math.inf if self.max_norm is None else self.max_norm

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """See the class; `inf` for a norm that does not stand out."""
        limit, spikes = self._of_outliers(norm, state, step)
        return torch.where(spikes, limit, math.inf).clamp(max=self._fixed)

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Sequence[Tensor]:
        """Mean and variance with this norm; a spike enters as what it is clipped to."""
        mean, variance = state
        limit, spikes = self._of_outliers(norm, state, step)
        x, n = torch.where(spikes, limit, norm), step.seen + 1
        first = mean + (x - mean) / n
        later = self.alpha * mean + (1 - self.alpha) * x
        first_variance = variance + ((x - mean) * (x - first) - variance) / n
        off = x - later
        later_variance = self.alpha * variance + (1 - self.alpha) * (off * off)
        warms = step.seen < self.warmup
        return torch.where(warms, first, later), torch.where(warms, first_variance, later_variance)

    def _of_outliers(self, norm: Tensor, state: Tensor, step: LimitStep) -> tuple[Tensor, Tensor]:
        """The limit of each segment if its norm stands out, and whether it does."""
        mean, variance = state
        excess = norm - mean
        spikes = (step.seen >= self.warmup) & (excess > self.z * variance.sqrt())
        return mean + self.z * self.z * variance / excess, spikes

    def on_host(self, norm: float, numbers: Numbers) -> tuple[float, Callable[[Undo], None]]:  # type: ignore[override]
        """The same in Python floats."""
        seen, mean, variance = numbers[:3].tolist()
        x, limit, excess = norm, math.inf, norm - mean
        if seen >= self.warmup and excess > self.z * math.sqrt(variance):
            x = limit = mean + self.z * self.z * variance / excess
        if self.max_norm is not None and self.max_norm < limit:
            limit = self.max_norm
        return limit, partial(self._learn_on_host, numbers, x, seen, mean, variance)

    def _learn_on_host(
        self,
        numbers: Numbers,
        x: float,
        seen: float,
        mean: float,
        variance: float,
        undo: Undo,
    ) -> None:
        n = seen + 1
        if seen < self.warmup:
            new = mean + (x - mean) / n
            variance = variance + ((x - mean) * (x - new) - variance) / n
        else:
            new = self.alpha * mean + (1 - self.alpha) * x
            off = x - new
            variance = self.alpha * variance + (1 - self.alpha) * (off * off)
        _write(numbers, (n, new, variance), undo)


@dataclass(frozen=True)
class AutoClip(AdaptiveLimit):
    """Clips to a percentile of the norms so far (Seetharaman et al. 2020, arXiv 2007.14469).

    The limit is the `percentile` of the last `window` norms, this step's included, with linear
    interpolation. The paper keeps all norms of a run; a window that holds them all is the paper's
    rule.

    Args:
        percentile: From 0 to 100; the paper recommends 10.
        window: How many norms are kept, 16 bytes each.

    Example:
        >>> AutoClip().percentile
        10.0
    """

    percentile: float = 10.0
    window: int = 10_000

    def __post_init__(self) -> None:
        percentile = number_of("AutoClip percentile", self.percentile, "use a number up to 100")
        if not 0 <= percentile <= 100:  # NaN is not
            raise ValueError(
                f"AutoClip percentile={self.percentile!r} must be a number from 0 to 100"
            )
        _set(self, "percentile", percentile)
        count_of("AutoClip window", self.window, 1, LARGEST_WINDOW)

    @property
    def initial(self) -> Sequence[float]:  # type: ignore[override]
        """The norms in the order of their arrival, then sorted; `inf` where there is none yet."""
        return [math.inf] * (2 * self.window)

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """The percentile, this step's norm included."""
        ordered = self._with(norm, state, step)[1]
        last = (step.seen + 1).clamp(max=self.window) - 1
        place = last * (self.percentile / 100)
        low = place.floor()
        low_value = ordered.gather(0, low.long()[None])[0]
        high_value = ordered.gather(0, torch.minimum(low + 1, last).long()[None])[0]
        return low_value + (place - low) * (high_value - low_value)

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """The norm in place of the oldest one, and in its place among the sorted ones."""
        return torch.cat(self._with(norm, state, step))

    def _with(self, norm: Tensor, state: Tensor, step: LimitStep) -> tuple[Tensor, Tensor]:
        """Both rings with this norm in place of the oldest, each float64 `(window, S)`."""
        arrived, ordered = state.split(self.window)
        at = (step.seen % self.window).long()[None]
        oldest = arrived.gather(0, at)  # inf while the ring is not full
        leaves = (ordered < oldest).sum(0)
        enters = (ordered < norm).sum(0) - (oldest < norm).long()[0]
        # Without the oldest, those behind it move up; from `enters` on, they move back again.
        k = torch.arange(self.window, device=norm.device)[:, None]
        source = k - (k > enters).long()
        source = (source + (source >= leaves).long()).clamp(max=self.window - 1)
        ordered = torch.where(k == enters, norm, ordered.gather(0, source))
        return arrived.scatter(0, at, norm[None]), ordered

    def on_host(self, norm: float, numbers: Numbers) -> tuple[float, Callable[[Undo], None]]:  # type: ignore[override]
        """The same in Python floats: two searches by bisection, and one move of a part."""
        seen, window = int(numbers[0]), self.window
        filled, start = min(seen, window), 1 + window
        if seen < window:
            leaves = start + filled
            enters = bisect_left(numbers, norm, start, leaves)
        else:
            oldest = numbers[1 + seen % window]
            leaves = bisect_left(numbers, oldest, start, start + filled)
            enters = bisect_left(numbers, norm, start, start + filled) - (oldest < norm)
        last = min(seen + 1, window) - 1
        place = last * (self.percentile / 100)
        low = int(place)

        def ordered(i: int) -> float:
            i += start
            if i == enters:
                return norm
            i -= i > enters
            return numbers[i + (i >= leaves)]

        value = ordered(low)
        value += (place - low) * (ordered(min(low + 1, last)) - value)
        return value, partial(self._learn_on_host, numbers, norm, leaves, enters)

    def _learn_on_host(
        self, numbers: Numbers, norm: float, leaves: int, enters: int, undo: Undo
    ) -> None:
        at = 1 + int(numbers[0]) % self.window
        if undo is not None:
            undo.append(partial(self._restore, numbers, numbers[0], at, numbers[at]))
        if enters < leaves:
            numbers[enters + 1 : leaves + 1] = numbers[enters:leaves]
        elif enters > leaves:
            numbers[leaves:enters] = numbers[leaves + 1 : enters + 1]
        numbers[enters] = norm
        numbers[at] = norm
        numbers[0] += 1.0

    def _restore(self, numbers: Numbers, seen: float, at: int, oldest: float) -> None:
        """Sorts the norms of before anew: right wherever the change was interrupted."""
        numbers[0], numbers[at] = seen, oldest
        both = np.asarray(numbers)
        both[1 + self.window :] = np.sort(both[1 : 1 + self.window])


@dataclass(frozen=True)
class AdaGC(AdaptiveLimit):
    """Clips each tensor to its own moving average (Wang et al. 2025, arXiv 2502.11034).

    With the norm n of a tensor and N of the whole model, the limit of the tensor is

        n * max_norm / N      in the warm-up, so that the model's norm is clipped to `max_norm`
        ratio * average       afterwards

    and `average` is the smallest clipped norm of the warm-up, then the moving average of the
    clipped norms. Use it with `clip_scope="tensor"`.

    Args:
        ratio: How much larger than its average a norm may be; the paper's lambda_rel.
        beta: Weight of the past in the average.
        warmup: Steps with the limit for the whole model.
        max_norm: That limit; the paper's lambda_abs.

    Example:
        >>> AdaGC(warmup=10).ratio
        1.05
    """

    ratio: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    initial = (math.inf,)  # average: the first norm is the smallest

    def __post_init__(self) -> None:
        _set(self, "ratio", _positive("AdaGC ratio", self.ratio))
        _set(self, "beta", _fraction("AdaGC beta", self.beta))
        count_of("AdaGC warmup", self.warmup, 1, LARGEST_WINDOW)
        _set(self, "max_norm", _positive("AdaGC max_norm", self.max_norm))

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """See the class."""
        warms = step.seen < self.warmup
        return torch.where(warms, norm * (self.max_norm / step.total_norm), self.ratio * state[0])

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Sequence[Tensor]:
        """The average with this norm, clipped."""
        average = state[0]
        clipped = torch.minimum(norm, self.limit(norm, state, step))
        smallest = torch.minimum(average, clipped)
        moved = self.beta * average + (1 - self.beta) * clipped
        return [torch.where(step.seen < self.warmup, smallest, moved)]

    def on_host(self, norm: float, numbers: Numbers) -> tuple[float, Callable[[Undo], None]]:  # type: ignore[override]
        """The same in Python floats, for a model of one segment."""
        seen, average = numbers[:2].tolist()
        warms = seen < self.warmup
        if warms:
            limit = norm * (self.max_norm / norm) if norm else math.inf
        else:
            limit = self.ratio * average
        clipped = min(norm, limit)
        if warms:
            average = min(average, clipped)
        else:
            average = self.beta * average + (1 - self.beta) * clipped
        return limit, partial(_write, numbers, (seen + 1, average))


def _set(rule: AdaptiveLimit, name: str, value: float) -> None:
    """1 and 1.0 are one rule to all ranks."""
    object.__setattr__(rule, name, value)


def _positive(name: str, value: object) -> float:
    number = number_of(name, value, "use a finite number > 0")
    if not 0 < number < math.inf:  # NaN is neither
        raise ValueError(f"{name}={value!r} must be a finite number > 0")
    return number


def _fraction(name: str, value: object) -> float:
    number = number_of(name, value, "use a number from 0 to below 1")
    if not 0 <= number < 1:  # NaN is neither
        raise ValueError(f"{name}={value!r} must be a number from 0 to below 1")
    return number
