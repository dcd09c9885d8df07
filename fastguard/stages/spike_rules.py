"""The rules that decide whether a step is a spike: `SpikeRule` and `Threshold`.

`SpikeRule`: a value is a spike if it exceeds

    threshold = mean + sigma * max(std, 0.01 * |mean|, tiny)

of the last `window` accepted values of its signal (population std). The lower bound for std keeps
noise in a nearly constant signal from being a spike. OLMo trains with this rule, with a window of
128 steps and a warm-up of 64. `Threshold` is a fixed limit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastguard.errors.checked_numbers import count_of, is_integer, number_of
from fastguard.errors.logger import log
from fastguard.errors.plain_text import shown

Action = Literal["skip", "clip", "record"]
ACTIONS = ("skip", "clip", "record")
GRAD_NORM = "grad_norm"
LARGEST_WINDOW = 2**20
"""Largest number of values in a baseline (8 MB), since each step reads all of them."""
PATIENCE = 100
"""Number of steps after which a warning names losses that rules need and no step has passed."""


@dataclass(frozen=True, slots=True)
class SpikeRule:
    """Detects values far above the mean of the recent past.

    Args:
        window: Number of accepted values in the baseline, from 2 to 2**20. Default: 128.
        sigma: Number of standard deviations above the mean at which a value is a spike, > 0.
            Default: 6.
        warmup: Number of values before any value is judged, from 2 to `window`. Default: 64.
        action: `"skip"` the step, `"clip"` the gradient norm to the threshold, or only `"record"`.
            Default: `"skip"`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of range.

    Example:
        >>> SpikeRule(window=128, sigma=6.0, warmup=64).action
        'skip'
    """

    window: int = 128
    sigma: float = 6.0
    warmup: int = 64
    action: Action = "skip"

    fixed: ClassVar[float] = math.inf
    """The fixed threshold: none."""

    def __post_init__(self) -> None:
        count_of("SpikeRule window", self.window, 2, LARGEST_WINDOW)
        if not (is_integer(self.warmup) and 2 <= self.warmup <= self.window):
            raise ValueError(
                f"SpikeRule warmup={shown(self.warmup)} must be an integer from 2 to "
                f"window={self.window}, the number of values in the baseline"
            )
        sigma = number_of("SpikeRule sigma", self.sigma, "use a finite number > 0")
        if not 0 < sigma < math.inf:  # this form also rejects NaN
            raise ValueError(f"SpikeRule sigma={self.sigma!r} must be a finite number > 0")
        # stored as float, so that ranks with 6 and 6.0 agree
        object.__setattr__(self, "sigma", sigma)
        _check_action(self.action, "SpikeRule")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Detects values above a fixed limit.

    Args:
        max: The largest value that is not a spike, > 0.
        action: As in `SpikeRule`. Default: `"skip"`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or is out of range.

    Example:
        >>> Threshold(max=100.0)
        Threshold(max=100.0, action='skip')
    """

    max: float
    action: Action = "skip"

    window: ClassVar[int] = 0  # a threshold has no baseline
    sigma: ClassVar[float] = 0.0
    warmup: ClassVar[int] = 0

    @property
    def fixed(self) -> float:
        """The fixed threshold."""
        return self.max

    def __post_init__(self) -> None:
        limit = number_of("Threshold max", self.max, "use a number > 0")
        if not limit > 0:  # this form also rejects NaN
            raise ValueError(f"Threshold max={self.max!r} must be a number > 0")
        object.__setattr__(self, "max", limit)
        _check_action(self.action, "Threshold")


Rule = SpikeRule | Threshold
"""Each rule has `window` (0: no baseline), `sigma`, `warmup`, `fixed` and `action`."""


def _check_action(action: object, where: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"{where} action={action!r} is unknown; use one of {', '.join(ACTIONS)}")


def rules_by_signal(spike: Rule | Mapping[str, Rule] | None) -> dict[str, Rule]:
    """Converts the argument `spike` into a dict by signal name.

    Raises:
        TypeError: The argument is neither a rule nor a dict of rules.
        ValueError: A rule on a loss has `action="clip"`; only the gradient norm can be clipped.
    """
    if spike is None:
        return {}
    if isinstance(spike, SpikeRule | Threshold):
        return {GRAD_NORM: spike}
    if isinstance(spike, int | float) and not isinstance(spike, bool):
        raise TypeError(
            f"spike={spike!r} is a number, not a rule; pass spike=SpikeRule(sigma={spike!r}) for "
            f"a limit of {spike!r} standard deviations above the recent mean, or "
            f"spike=Threshold(max={spike!r}) for a fixed limit"
        )
    if not isinstance(spike, Mapping):
        raise TypeError(
            f"spike={shown(spike)} must be a SpikeRule, a Threshold, or a dict of such rules by "
            f"signal ('{GRAD_NORM}' or the name of a loss)"
        )
    for signal, rule in spike.items():
        if not isinstance(signal, str) or not isinstance(rule, SpikeRule | Threshold):
            raise TypeError(
                f"spike[{shown(signal)}]={shown(rule)} must be a SpikeRule or a Threshold"
            )
        if rule.action == "clip" and signal != GRAD_NORM:
            raise ValueError(
                f"spike[{signal!r}] has action='clip', but only '{GRAD_NORM}' can be clipped; "
                "use action='skip' or 'record'"
            )
    return dict(spike)


class MissingLosses:
    """Warns once about spike rules on losses that are never passed.

    Args:
        missing: Names of the losses that rules need.
    """

    def __init__(self, missing: Iterable[str]) -> None:
        self._missing = list(missing)
        self._given: set[str] = set()
        self._steps = 0

    @classmethod
    def of(cls, rules: Mapping[str, Rule]) -> MissingLosses | None:
        """Returns the losses that the rules of a new run need; None if no rule needs a loss."""
        missing = [signal for signal in rules if signal != GRAD_NORM]
        return cls(missing) if missing else None

    def after(self, losses: Collection[str]) -> MissingLosses | None:
        """Records that losses with these names were passed to a step.

        Returns:
            This object; None once all losses have been passed, or the warning was given.
        """
        self._given.update(losses)
        self._missing = [signal for signal in self._missing if signal not in losses]
        self._steps += 1
        if self._missing and self._steps < PATIENCE:
            return self
        for signal in self._missing:
            log.warning("%s", self._warning(signal))
        return None

    def _warning(self, signal: str) -> str:
        near = difflib.get_close_matches(signal, [*self._given, GRAD_NORM], n=1, cutoff=0.5)
        given = ", ".join(map(repr, sorted(self._given)))
        return (
            f"the spike rule on {signal!r} received no value in {self._steps} steps: "
            + (f"the losses passed are {given}" if given else "no loss was passed")
            + (f"; did you mean {near[0]!r}?" if near else f"; pass {_how_to_give(signal)}")
        )


def _how_to_give(signal: str) -> str:
    return "opt.step(loss=loss)" if signal == "loss" else f"opt.step(loss={{{signal!r}: ...}})"
