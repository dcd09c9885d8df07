"""The counts of a whole run, beside those of the state in force, which loads take back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.stages.contract import GuardState

KEY = "taken_back"
"""In the guard's state: int64 `(4,)`, what the counts of the run exceed those of the state by."""

_COUNTED = (0, 1, 2, 4)  # of GuardState.counters


class Lifetime(NamedTuple):
    """What happened in the life of a run, also to states that a rollback took back.

    Attributes:
        steps: Steps decided.
        applied: Those that reached the weights.
        skipped: Those that did not.
        loss_scale_skips: Those of the skipped that only lowered a loss scale.
    """

    steps: int = 0
    applied: int = 0
    skipped: int = 0
    loss_scale_skips: int = 0

    @staticmethod
    def of(state: GuardState, taken_back: Lifetime) -> Lifetime:
        """The counts of the run: those of the state and what loads took back. Waits for a GPU.

        The counters of placeholders tell nothing.
        """
        if not has_numbers(state.counters):
            return taken_back
        counters = state.counters.tolist()
        return Lifetime(*(counters[i] + n for i, n in zip(_COUNTED, taken_back, strict=True)))

    def taken_back_of(self, state: GuardState) -> Lifetime:
        """What these counts exceed those of the state by."""
        return Lifetime(*(n - m for n, m in zip(self, Lifetime.of(state, NOTHING), strict=True)))


NOTHING = Lifetime()


def saved_with(saved: Mapping[str, Any] | None) -> Lifetime:
    """What loads had taken back when a state was saved; nothing if it does not say.

    Raises:
        ValueError: It is damaged.
    """
    given = None if saved is None else saved.get(KEY)
    if given is None or (isinstance(given, Tensor) and not has_numbers(given)):
        return NOTHING
    if not isinstance(given, Tensor) or given.shape != (len(_COUNTED),) or bool((given < 0).any()):
        raise ValueError(
            f"the guard's state has {KEY}={given!r}; it is damaged: delete "
            f"state_dict['fastguard']['{KEY}'] to count from the loaded state on"
        )
    return Lifetime(*map(int, given.tolist()))
