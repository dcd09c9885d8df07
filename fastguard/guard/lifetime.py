"""`Lifetime`: the step counts of a whole run, including steps that a rollback has taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.stages.contract import GuardState

KEY = "taken_back"
"""Key in the saved state: int64 `(4,)`, the counts of the run minus the counts of the state."""

_COUNTED = (0, 1, 2, 4)  # indices in GuardState.counters


class Lifetime(NamedTuple):
    """Step counts of a whole run; steps that a rollback has taken back still count.

    Attributes:
        steps: Number of steps.
        applied: Number of applied steps.
        skipped: Number of skipped steps.
        loss_scale_skips: Number of skipped steps that only lowered a loss scale.
    """

    steps: int = 0
    applied: int = 0
    skipped: int = 0
    loss_scale_skips: int = 0

    @staticmethod
    def of(state: GuardState, taken_back: Lifetime) -> Lifetime:
        """Returns the counts of a state plus those taken back by loading. Waits for a GPU.

        The counters of placeholders have no values and add nothing.
        """
        if not has_numbers(state.counters):
            return taken_back
        counters = state.counters.tolist()
        return Lifetime(*(counters[i] + n for i, n in zip(_COUNTED, taken_back, strict=True)))

    def taken_back_of(self, state: GuardState) -> Lifetime:
        """Returns these counts minus the counts of a state."""
        return Lifetime(*(n - m for n, m in zip(self, Lifetime.of(state, NOTHING), strict=True)))


NOTHING = Lifetime()


def saved_with(saved: Mapping[str, Any] | None) -> Lifetime:
    """Returns the counts taken back by loading, as saved in a state; zero if the entry is missing.

    Raises:
        ValueError: The entry is damaged.
    """
    given = None if saved is None else saved.get(KEY)
    if given is None or (isinstance(given, Tensor) and not has_numbers(given)):
        return NOTHING
    if not isinstance(given, Tensor) or given.shape != (len(_COUNTED),) or bool((given < 0).any()):
        raise ValueError(
            f"state_dict['fastguard'] has {KEY}={given!r}, which must be {len(_COUNTED)} counts "
            f">= 0; delete state_dict['fastguard']['{KEY}'] to count from the loaded state on"
        )
    return Lifetime(*map(int, given.tolist()))
