"""A guarded step is taken or it is not, whatever interrupts it.

An exception can come at any line: out of memory in the wrapped step, Ctrl-C anywhere. What a step
changes in the guard is therefore either kept as it was before (counters, spike baselines, observed
losses), or can be written down again and again with the same result (records, the last verdict, the
number of the step). The step counts from the moment when the wrapped optimizer has returned: before
it nothing is counted, and from then on everything is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastguard.guard.clamp import Clamped
from fastguard.guard.inner_step import StepCall
from fastguard.records.device_row import Outcome
from fastguard.records.losses import ObservedLosses
from fastguard.stages.contract import GuardState


class StepInFlight:
    """A guarded step that has begun.

    Args:
        number: Which step this is, from 1, if it is taken.
        call: Where the return of the wrapped optimizer is noted.
        observed: The losses so far.

    Attributes:
        clamped: Its gradients if they were clamped.
        outcome: What was decided; None before that.
        obeyed: Whether the verdict is carried out.
    """

    def __init__(self, number: int, call: StepCall, observed: ObservedLosses) -> None:
        self.number = number
        self.clamped: Clamped | None = None
        self.outcome: Outcome | None = None
        self.obeyed = False
        self._call = call
        self._observed = observed
        self._losses = observed.kept()
        self._undo: list[Callable[[], object]] = []

    @property
    def is_taken(self) -> bool:
        """Whether the wrapped optimizer has stepped, or was told not to."""
        return self.obeyed or bool(self._call.returned)

    def keep(self, state: GuardState) -> None:
        """Has the decision note what it changes."""
        state.undo = self._undo

    def use_up_losses(self) -> None:
        """The guard itself refuses the step: its losses are not kept for another try."""
        self._losses = []

    @torch.no_grad()
    def take_back(self) -> None:
        """The guard as it was before the step, and gradients as far as there are copies."""
        for put_back in reversed(self._undo):
            put_back()
        if self.clamped is not None:
            self.clamped.put_back()
        self._observed.give_back(self._losses)
