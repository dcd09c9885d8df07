"""When is a step a spike? The two rules, and what a device keeps to judge them.

`SpikeRule`: a value is a spike when it exceeds

    threshold = mean + sigma * max(std, 0.01 * |mean|, tiny)

of the last `window` accepted values of its signal (population std). `Threshold` is a fixed limit.
The sigma rule over 128 steps after a warm-up of 64 is the one that OLMo trains with; the floor
under std keeps a nearly constant signal from calling noise a spike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["skip", "clip", "record"]
ACTIONS = ("skip", "clip", "record")
GRAD_NORM = "grad_norm"


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

    def __post_init__(self) -> None:
        if not (isinstance(self.window, int) and self.window >= 2):
            raise ValueError(f"SpikeRule window={self.window!r} must be an integer >= 2")
        if not (isinstance(self.warmup, int) and 2 <= self.warmup <= self.window):
            raise ValueError(
                f"SpikeRule warmup={self.warmup!r} must be an integer from 2 to "
                f"window={self.window}: the baseline holds no more than that"
            )
        if not (isinstance(self.sigma, int | float) and 0 < self.sigma < math.inf):
            raise ValueError(f"SpikeRule sigma={self.sigma!r} must be a finite number > 0")
        object.__setattr__(self, "sigma", float(self.sigma))  # 6 and 6.0 are one rule to all ranks
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

    def __post_init__(self) -> None:
        if not (isinstance(self.max, int | float) and self.max > 0):  # NaN is not > 0
            raise ValueError(f"Threshold max={self.max!r} must be a number > 0")
        object.__setattr__(self, "max", float(self.max))
        _check_action(self.action, "Threshold")


Rule = SpikeRule | Threshold


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
