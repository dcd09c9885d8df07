"""When is a step a spike? The two rules, and what a device keeps to judge them.

`SpikeRule`: a value is a spike when it exceeds

    threshold = mean + sigma * max(std, 0.01 * |mean|, tiny)

of the last `window` accepted values of its signal (population std). `Threshold` is a fixed limit.
The sigma rule over 128 steps after a warm-up of 64 is the one that OLMo trains with; the floor
under std keeps a nearly constant signal from calling noise a spike.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastguard.errors.checked_numbers import count_of, is_integer, number_of
from fastguard.errors.plain_text import shown

Action = Literal["skip", "clip", "record"]
ACTIONS = ("skip", "clip", "record")
GRAD_NORM = "grad_norm"
LARGEST_WINDOW = 2**20
"""Values of a baseline: 8 MB, looked at in each step."""
PATIENCE = 100
"""Steps after which a loss that a rule waits for is missed."""

log = logging.getLogger("fastguard")


@dataclass(frozen=True, slots=True)
class SpikeRule:
    """A spike is what stands out of the recent past.

    Args:
        window: How many accepted values make the baseline.
        sigma: How many standard deviations above their mean is too much.
        warmup: Nothing is judged before this many values have been seen.
        action: `"skip"` the step, `"clip"` the gradient norm to the threshold, or only `"record"`.

    Example:
        >>> SpikeRule(window=128, sigma=6.0, warmup=64).action
        'skip'
    """

    window: int = 128
    sigma: float = 6.0
    warmup: int = 64
    action: Action = "skip"

    fixed: ClassVar[float] = math.inf
    """The limit that does not depend on a baseline: none."""

    def __post_init__(self) -> None:
        count_of("SpikeRule window", self.window, 2, LARGEST_WINDOW)
        if not (is_integer(self.warmup) and 2 <= self.warmup <= self.window):
            raise ValueError(
                f"SpikeRule warmup={shown(self.warmup)} must be an integer from 2 to "
                f"window={self.window}: the baseline holds no more than that"
            )
        sigma = number_of("SpikeRule sigma", self.sigma, "use a finite number > 0")
        if not 0 < sigma < math.inf:  # NaN is neither
            raise ValueError(f"SpikeRule sigma={self.sigma!r} must be a finite number > 0")
        object.__setattr__(self, "sigma", sigma)  # 6 and 6.0 are one rule to all ranks
        _check_action(self.action, "SpikeRule")


@dataclass(frozen=True, slots=True)
class Threshold:
    """A spike is what exceeds a fixed limit.

    Args:
        max: The largest value that is not a spike.
        action: As in `SpikeRule`.

    Example:
        >>> Threshold(max=100.0)
        Threshold(max=100.0, action='skip')
    """

    max: float
    action: Action = "skip"

    window: ClassVar[int] = 0  # no baseline
    sigma: ClassVar[float] = 0.0
    warmup: ClassVar[int] = 0

    @property
    def fixed(self) -> float:
        """The limit that does not depend on a baseline."""
        return self.max

    def __post_init__(self) -> None:
        limit = number_of("Threshold max", self.max, "use a number > 0")
        if not limit > 0:  # NaN is not > 0
            raise ValueError(f"Threshold max={self.max!r} must be a number > 0")
        object.__setattr__(self, "max", limit)
        _check_action(self.action, "Threshold")


Rule = SpikeRule | Threshold
"""Each has `window`, `sigma`, `warmup`, `fixed` and `action`; a window of 0 keeps no baseline."""


def _check_action(action: object, where: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"{where} action={action!r} is unknown; use one of {', '.join(ACTIONS)}")


def rules_by_signal(spike: Rule | Mapping[str, Rule] | None) -> dict[str, Rule]:
    """`spike=` as the user gave it, as a dict by signal name.

    Raises:
        TypeError: Not a rule, nor a dict of rules.
        ValueError: `action="clip"` for a loss: there is no gradient norm to scale to.
    """
    if spike is None:
        return {}
    if isinstance(spike, SpikeRule | Threshold):
        return {GRAD_NORM: spike}
    if isinstance(spike, int | float) and not isinstance(spike, bool):
        raise TypeError(
            f"spike={spike!r} is a number, not a rule; pass spike=SpikeRule(sigma={spike!r}) to "
            f"judge by the recent mean + {spike!r} standard deviations, or "
            f"spike=Threshold(max={spike!r}) for a fixed limit"
        )
    if not isinstance(spike, Mapping):
        raise TypeError(
            f"spike={spike!r} must be a SpikeRule, a Threshold, or a dict of them by signal "
            f"('{GRAD_NORM}' or the name of a loss)"
        )
    for signal, rule in spike.items():
        if not isinstance(signal, str) or not isinstance(rule, SpikeRule | Threshold):
            raise TypeError(f"spike[{signal!r}]={rule!r} must be a SpikeRule or a Threshold")
        if rule.action == "clip" and signal != GRAD_NORM:
            raise ValueError(
                f"spike[{signal!r}] has action='clip', but only '{GRAD_NORM}' can be clipped; "
                "use action='skip' or 'record'"
            )
    return dict(spike)


class UnmetRules:
    """Rules on losses that nobody has given so far, to be said once.

    Args:
        missing: Their signals.
    """

    def __init__(self, missing: Iterable[str]) -> None:
        self._missing = list(missing)
        self._given: set[str] = set()
        self._steps = 0

    @classmethod
    def of(cls, rules: Mapping[str, Rule]) -> UnmetRules | None:
        """Those of a run that is about to begin; None if no rule waits for a loss."""
        missing = [signal for signal in rules if signal != GRAD_NORM]
        return cls(missing) if missing else None

    def after(self, losses: Collection[str]) -> UnmetRules | None:
        """What is left after a step with losses of these names; None once all is met or said."""
        self._given.update(losses)
        self._missing = [signal for signal in self._missing if signal not in losses]
        self._steps += 1
        if self._missing and self._steps < PATIENCE:
            return self
        for signal in self._missing:
            log.warning("%s", self._complaint(signal))
        return None

    def _complaint(self, signal: str) -> str:
        near = difflib.get_close_matches(signal, [*self._given, GRAD_NORM], n=1, cutoff=0.5)
        given = ", ".join(map(repr, sorted(self._given)))
        return (
            f"the spike rule on {signal!r} has judged nothing in {self._steps} steps: "
            + (f"the losses given are {given}" if given else "no loss was given")
            + (f"; did you mean {near[0]!r}?" if near else f"; pass {_how_to_give(signal)}")
        )


def _how_to_give(signal: str) -> str:
    return "opt.step(loss=loss)" if signal == "loss" else f"opt.step(loss={{{signal!r}: ...}})"
