"""Limits of the gradient norm that adapt during training: `AdaptiveLimit`, `ZClip`, `AdaGC`.

A rule consists of two functions of tensors: `limit` computes the limit of a step from its norm and
a few numbers, and `learn` updates these numbers after a step that was applied. The rules here also
implement them in Python floats (`on_host`), for one segment on a CPU, where a single operation on a
tensor would cost more than the whole rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import count_of, number_of

Undo = list[Callable[[], object]] | None
if TYPE_CHECKING:
    Numbers = memoryview[float]
else:  # before Python 3.14, memoryview cannot be subscripted
    Numbers = memoryview
LARGEST_WINDOW = 2**20
"""Largest `warmup`, and largest `window` of `AutoClip`, which then takes 16 MB per segment."""


class LimitStep(NamedTuple):
    """Inputs of a rule besides the norms of the segments.

    Attributes:
        total_norm: float64 `()`: norm of the whole model in this step.
        seen: float64 `(S,)`: number of norms that the rule has learned so far, per segment.
    """

    total_norm: Tensor
    seen: Tensor


class AdaptiveLimit:
    """Base class of rules that set `max_norm` in each step.

    A segment is what one clip coefficient applies to, see `clip_scope`. A rule keeps N numbers per
    segment; the guard stores them, saves them in `state_dict`, and restores them if a step fails.

    Attributes:
        initial: The N numbers of a segment before the first step.

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

    initial: ClassVar[Sequence[float]] = ()

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """Returns the limit of each segment for this step.

        Args:
            norm: float64 `(S,)`: norms of the finite elements in this step.
            state: float64 `(N, S)`: the numbers of the rule.
            step: Further values of this step.

        Returns:
            float64 `(S,)`; `inf` or NaN: the segment is not clipped.
        """
        raise NotImplementedError

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor | Sequence[Tensor]:
        """Returns the numbers after this step.

        The new numbers of a segment are stored only if the step was applied, the norm of the
        segment is above zero, and none of the numbers is NaN.

        Args:
            norm, state, step: As for `limit`.

        Returns:
            N rows, float64 `(S,)`.
        """
        raise NotImplementedError

    on_host: Callable[[float, Numbers, bool, Undo], float] | None = None
    """Computes the limit of a single segment in Python floats; None: not implemented.

    Takes the norm, the numbers `(seen, *numbers)`, whether to update these in place, and None or a
    list to which to append a call that reverts the update. Returns the limit.
    """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({settings})"


def _restore(numbers: Numbers, *values: float) -> None:
    """Replaces the first numbers."""
    for i, value in enumerate(values):
        numbers[i] = value


@dataclass(frozen=True)
class ZClip(AdaptiveLimit):
    """Clips norms far above a moving average (Kumar et al. 2025, arXiv 2504.02507).

    With the moving mean m and standard deviation s of the norms, a norm n > m + z * s is clipped to

        m + z^2 * s^2 / (n - m)

    and the averages use this value instead of n. The larger the spike, the closer to m it is
    clipped.

    Args:
        z: Number of standard deviations above the mean from which a norm is clipped. Default: 2.5.
        alpha: Weight of the past in the moving averages, in [0, 1). Default: 0.97.
        warmup: Number of norms from which the first mean and variance are computed, at least 2;
            until then, `max_norm` is the only limit. Default: 25.
        max_norm: A limit that always applies; None: no such limit. Default: 1.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of range.

    Example:
        >>> ZClip(z=3.0).warmup
        25
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0

    initial: ClassVar[Sequence[float]] = (0.0, 0.0)  # mean, variance

    def __post_init__(self) -> None:
        set_number(self, "z", _positive("ZClip z", self.z))
        set_number(self, "alpha", _fraction("ZClip alpha", self.alpha))
        count_of("ZClip warmup", self.warmup, 2, LARGEST_WINDOW)
        if self.max_norm is not None:
            set_number(self, "max_norm", _positive("ZClip max_norm", self.max_norm))

    @property
    def _fixed(self) -> float:
        return math.inf if self.max_norm is None else self.max_norm

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """Returns the limits; `max_norm` or `inf` for a norm that is not a spike."""
        limit, spikes = self._spike_limit(norm, state, step)
        return torch.where(spikes, limit, math.inf).clamp(max=self._fixed)

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Sequence[Tensor]:
        """Returns mean and variance including this norm, or including its limit for a spike."""
        mean, variance = state
        limit, spikes = self._spike_limit(norm, state, step)
        x, n = torch.where(spikes, limit, norm), step.seen + 1
        first = mean + (x - mean) / n
        later = self.alpha * mean + (1 - self.alpha) * x
        first_variance = variance + ((x - mean) * (x - first) - variance) / n
        off = x - later
        later_variance = self.alpha * variance + (1 - self.alpha) * (off * off)
        warms = step.seen < self.warmup
        return torch.where(warms, first, later), torch.where(warms, first_variance, later_variance)

    def _spike_limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> tuple[Tensor, Tensor]:
        """Returns, per segment, the limit for a spike, and whether the norm is a spike."""
        mean, variance = state
        excess = norm - mean
        spikes = (step.seen >= self.warmup) & (excess > self.z * variance.sqrt())
        return mean + self.z * self.z * variance / excess, spikes

    def on_host(self, norm: float, numbers: Numbers, learns: bool, undo: Undo) -> float:  # type: ignore[override]
        """Computes limit and update in Python floats: see `AdaptiveLimit.on_host`."""
        # Reading three items takes half the time of a slice and `tolist`.
        seen, mean, variance = numbers[0], numbers[1], numbers[2]
        x, limit, excess, warms = norm, math.inf, norm - mean, seen < self.warmup
        if excess > 0.0 and not warms and excess > self.z * math.sqrt(variance):
            x = limit = mean + self.z * self.z * variance / excess
        if learns:
            if undo is not None:
                undo.append(partial(_restore, numbers, seen, mean, variance))
            numbers[0] = n = seen + 1.0
            if warms:
                numbers[1] = new = mean + (x - mean) / n
                numbers[2] = variance + ((x - mean) * (x - new) - variance) / n
            else:
                alpha = self.alpha
                numbers[1] = new = alpha * mean + (1 - alpha) * x
                off = x - new
                numbers[2] = alpha * variance + (1 - alpha) * (off * off)
        fixed = self.max_norm
        return limit if fixed is None or not fixed < limit else fixed


@dataclass(frozen=True)
class AdaGC(AdaptiveLimit):
    """Clips each tensor relative to its own moving average (Wang et al. 2025, arXiv 2502.11034).

    For a tensor with gradient norm n, in a model with gradient norm N, the limit is

        n * max_norm / N      during the warm-up: the norm of the model is clipped to `max_norm`
        ratio * average       afterward

    where `average` starts with the smallest clipped norm of the warm-up and is then the moving
    average of the clipped norms. Use it with `clip_scope="tensor"`.

    Args:
        ratio: The limit as a multiple of the average; lambda_rel in the paper. Default: 1.05.
        beta: Weight of the past in the average, in [0, 1). Default: 0.98.
        warmup: Number of steps with the limit for the whole model. Default: 100.
        max_norm: The limit during the warm-up; lambda_abs in the paper. Default: 1.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of range.

    Example:
        >>> AdaGC(warmup=10).ratio
        1.05
    """

    ratio: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    initial: ClassVar[Sequence[float]] = (math.inf,)  # the average, before any norm

    def __post_init__(self) -> None:
        set_number(self, "ratio", _positive("AdaGC ratio", self.ratio))
        set_number(self, "beta", _fraction("AdaGC beta", self.beta))
        count_of("AdaGC warmup", self.warmup, 1, LARGEST_WINDOW)
        set_number(self, "max_norm", _positive("AdaGC max_norm", self.max_norm))

    def limit(self, norm: Tensor, state: Tensor, step: LimitStep) -> Tensor:
        """Returns the limits of this step; see the class."""
        warms = step.seen < self.warmup
        return torch.where(warms, norm * (self.max_norm / step.total_norm), self.ratio * state[0])

    def learn(self, norm: Tensor, state: Tensor, step: LimitStep) -> Sequence[Tensor]:
        """Returns the averages including this step's clipped norms."""
        average = state[0]
        clipped = torch.minimum(norm, self.limit(norm, state, step))
        smallest = torch.minimum(average, clipped)
        moved = self.beta * average + (1 - self.beta) * clipped
        return [torch.where(step.seen < self.warmup, smallest, moved)]

    def on_host(self, norm: float, numbers: Numbers, learns: bool, undo: Undo) -> float:  # type: ignore[override]
        """Computes limit and update in Python floats: see `AdaptiveLimit.on_host`."""
        seen, average = numbers[0], numbers[1]
        if seen < self.warmup:
            limit = norm * (self.max_norm / norm) if norm else math.inf
            clipped = norm if norm < limit else limit
            new = average if average < clipped else clipped
        else:
            limit, beta = self.ratio * average, self.beta
            new = beta * average + (1 - beta) * (norm if norm < limit else limit)
        if learns:
            if undo is not None:
                undo.append(partial(_restore, numbers, seen, average))
            numbers[0], numbers[1] = seen + 1.0, new
        return limit


def set_number(rule: AdaptiveLimit, name: str, value: float) -> None:
    """Stores a setting as a float, so that ranks with 1 and 1.0 agree."""
    object.__setattr__(rule, name, value)


def _positive(name: str, value: object) -> float:
    number = number_of(name, value, "use a finite number > 0")
    if not 0 < number < math.inf:  # this form also rejects NaN
        raise ValueError(f"{name}={value!r} must be a finite number > 0")
    return number


def _fraction(name: str, value: object) -> float:
    number = number_of(name, value, "use a number in [0, 1)")
    if not 0 <= number < 1:  # this form also rejects NaN
        raise ValueError(f"{name}={value!r} must be a number in [0, 1)")
    return number
