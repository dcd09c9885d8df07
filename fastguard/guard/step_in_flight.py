"""`StepInFlight`: makes a guarded step atomic; after an exception it counts fully or not at all.

An exception can occur at any line: an out-of-memory error in the wrapped step, or Ctrl-C anywhere.
The guard therefore keeps the previous values of counters, spike baselines and observed losses.
Records, the last verdict and the step number are written in a way that can be repeated. Once the
wrapped optimizer has returned, the step counts in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastguard.guard.clamp import Clamped
from fastguard.guard.inner_step import StepCall
from fastguard.records.device_row import Outcome
from fastguard.records.losses import ObservedLosses
from fastguard.stages.contract import GuardState
from fastguard.stages.units import concluded


class StepInFlight:
    """A guarded step that has begun but not ended.

    Args:
        number: The number of the step, from 1, which it keeps if it is taken.
        call: The call of the wrapped optimizer, which records its return.
        observed: The losses passed so far.

    Attributes:
        clamped: The gradients that were clamped, if any.
        outcome: The decision and its inputs; None before the decision.
        obeyed: Whether the verdict has been carried out.
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
        """Whether the wrapped optimizer has stepped, or was skipped."""
        return self.obeyed or bool(self._call.returned)

    def keep(self, state: GuardState) -> None:
        """Makes the decision record in `state.undo` how to undo its changes of the state."""
        state.undo = self._undo

    def use_up_losses(self) -> None:
        """Makes `take_back` drop the losses, for a step that the guard itself refuses."""
        self._losses = []

    def concluded(self, outcome: Outcome) -> Outcome:
        """Returns the outcome of a taken step, with what the update added to its verdict."""
        if outcome.verdict.units is not None:
            outcome = self.outcome = replace(outcome, verdict=concluded(outcome.verdict))
        return outcome

    @torch.no_grad()
    def take_back(self) -> None:
        """Restores counters, baselines and losses; also clamped gradients, if there are copies."""
        for put_back in reversed(self._undo):
            put_back()
        if self.clamped is not None:
            self.clamped.put_back()
        self._observed.give_back(self._losses)
