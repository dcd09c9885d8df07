"""Detects faults of the training loop that show only over many records; each is logged once.

* Gradients clipped before they reach the guard: their norm equals the limit at every step, so the
  records are uninformative and spike rules never trigger.
* A loss scale that should fall but does not, so that no step is ever applied.

Each record is checked when it reaches the host, with comparisons of a few Python floats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastguard.errors.logger import log

if TYPE_CHECKING:
    from fastguard.records.step_record import StepRecord

EXACT = 1e-4
"""Relative tolerance; float32 gradients clipped to 1 have a norm of 1 within 2e-7."""

ROUGH = 1e-2
"""Tolerance in bfloat16, where torch rounds the norm and the coefficient to three digits."""

AT_LIMIT, NEAR_LIMIT, CONSTANT = 20, 100, 100
"""Numbers of matching steps after which the fault is reported, for a norm within `EXACT` of the
limit, within `ROUGH` of the limit, and for a constant norm. The norm of unclipped gradients varies:
it is within 1e-4 of a given number once in thousands of steps, and does not stay within 1 % below
that number.
"""

HIT = 3
"""A matching step adds this number to a count; a step that does not match subtracts 1."""

LONGEST_SEARCH = 160
"""Number of skipped steps in which a scaler can halve its scale from the largest float32 to the
smallest, with some retries."""


class Advice:
    """Checks the records of one run, in order."""

    def __init__(self) -> None:
        self._clipped_before = ClippedBefore()
        self._searches = 0

    def check(
        self, record: StepRecord, max_norm: float | None, longest_search: int = LONGEST_SEARCH
    ) -> None:
        """Processes one record.

        Args:
            record: The next record.
            max_norm: The given limit of the whole model's norm in this step; inf: no limit; None:
                the guard cannot clip.
            longest_search: Steps in a row that may be skipped to lower a loss scale.
        """
        if record.reason is None:
            self._searches = 0
            if max_norm is not None:
                self._clipped_before.check(record.total_norm, max_norm)
        elif record.is_incident:
            self._searches = 0
        else:
            self._searches += 1
            if self._searches == longest_search:
                _warn_scale_does_not_fall(longest_search)


class ClippedBefore:
    """Detects from the norms of a run whether gradients were already clipped.

    A step that was not clipped lowers a count but does not reset it, so that a loop that clips in
    most of its steps is detected too.
    """

    def __init__(self) -> None:
        self.has_warned: bool = False
        self._at_limit = self._near_limit = self._alike = 0
        # range of the norms that are nearly equal
        self._first = self._lowest = self._highest = math.nan

    def check(self, norm: float, max_norm: float) -> None:
        """Processes the norm of one step."""
        if self.has_warned or not 0.0 < norm < math.inf:
            return
        if 0.0 < max_norm < math.inf and self._is_at_limit(norm, max_norm):
            self._warn(f"{max_norm:g}, which is the guard's own max_norm")
        elif self._is_constant(norm):
            self._warn(f"{self._first:.4g}, as if clipped to a limit other than the guard's")

    def _is_at_limit(self, norm: float, max_norm: float) -> bool:
        off = abs(norm - max_norm)
        if off > ROUGH * max_norm:  # true for nearly every step of a normal run
            if self._at_limit:
                self._at_limit -= 1
            if self._near_limit:  # a norm above the limit cannot have been clipped to it
                self._near_limit = self._near_limit - 1 if norm < max_norm else 0
            return False
        self._near_limit += HIT
        self._at_limit = max(self._at_limit + (HIT if off <= EXACT * max_norm else -1), 0)
        return self._at_limit >= HIT * AT_LIMIT or self._near_limit >= HIT * NEAR_LIMIT

    def _is_constant(self, norm: float) -> bool:
        """Whether the norm stays at a number that a person could have chosen as a limit.

        Norms that are all bitwise equal do not count: clipped norms differ by rounding errors,
        whereas a toy model with a constant gradient has exactly the same norm at every step.
        """
        if not abs(norm - self._first) <= EXACT * self._first:  # the condition is also True for NaN
            if self._alike:
                self._alike -= 1
            else:
                self._first = self._lowest = self._highest = norm
            return False
        self._alike += HIT
        self._lowest, self._highest = min(self._lowest, norm), max(self._highest, norm)
        moves = self._lowest < self._highest
        return self._alike >= HIT * CONSTANT and moves and _is_limit(self._first)

    def _warn(self, what: str) -> None:
        self.has_warned = True
        log.warning(
            "the gradient norm is the same at nearly every step: %s. This is typical of gradients "
            "clipped before they reach the guard: its records then show the limit instead of the "
            "norm, and spike rules have no effect. If the loop calls clip_grad_norm_, remove that "
            "call: the guard clips by itself",
            what,
        )


def _is_limit(x: float) -> bool:
    """Whether a number or its square has two significant digits, such as 0.25 or 10.

    The square of the norm is the sum of the squares of the norms of parts, clipped one by one.
    """
    return _is_round(x, EXACT) or _is_round(x * x, 2 * EXACT)


def _is_round(x: float, tolerance: float) -> bool:
    return abs(x - float(f"{x:.1e}")) <= tolerance * x


def _warn_scale_does_not_fall(steps: int) -> None:
    log.warning(
        "%d steps in a row were skipped to lower the loss scale, enough to lower any scale to its "
        "minimum. The scaler may not be lowering the scale: call scaler.update() after each step, "
        "without an argument",
        steps,
    )
