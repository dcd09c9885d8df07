"""`Warmup`: the settings of a warm-up, used by `GuardedLR`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastguard.errors.checked_numbers import TEXT, count_of, number_of


@dataclass(frozen=True, slots=True)
class Warmup:
    """A linear transition from initial values to the schedule, over applied steps.

    Args:
        steps: Number of applied steps, >= 1.
        lr: Initial learning rate, one for all param groups or one per group. It may be above the
            schedule, since the learning rate of biases is often lowered during warm-up. Default: 0.
        momentum: Initial momentum (beta1 for the Adam family), in the same form; None: unchanged.

    Example:
        >>> Warmup(steps=1000, lr=(0.1, 0.0, 0.0), momentum=0.8).steps
        1000
    """

    steps: int
    lr: float | Sequence[float] = 0.0
    momentum: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        count_of("Warmup steps", self.steps, 1)
        for name in ("lr", "momentum"):
            value = getattr(self, name)
            several = isinstance(value, Sequence) and not isinstance(value, TEXT)
            for v in value if several else () if value is None else (value,):
                if not 0 <= number_of(f"Warmup {name}", v, "use numbers >= 0") < math.inf:
                    raise ValueError(f"Warmup {name}={value!r} must hold finite numbers >= 0")
