"""The interface of watched quantities: they read a step and add values to its record.

    Quantity.read(step) -> Reading     device tensors, before the decision; never waits
    Reading.results(numbers, known)    on the host, when the record is created

Values of a reading with `sums_over_ranks` become part of the vector that the ranks exchange anyway,
and are replaced by their sums over the ranks: 8 bytes per value, no further collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastguard.guard.clip_scope import Layout
from fastguard.ranks.dtensors import local_parts
from fastguard.ranks.team import Sharing
from fastguard.stages.contract import Known


@dataclass(frozen=True, slots=True)
class WatchedGradients:
    """The step that a quantity reads. All tensors are the local ones of this rank.

    Attributes:
        layout: The parameters and their names.
        device: The device of the decision, and of the values of a reading.
        sharing: How the ranks share the parameters; None in a single process.
        inv_scale: float64 `()`: the factor that unscales the gradients; None: 1.
        scale: The loss scale of this step, `()`; None: there is none.
        local_squared_norm: Returns the squared norm `()` of this rank's gradients before they were
            reduced, including the loss scale; None: not available.
        exact_weight: Returns the tensor that the optimizer updates for a parameter: its float32
            master copy, or the parameter itself. None: always the parameter itself.
    """

    layout: Layout
    device: torch.device
    sharing: Sharing | None = None
    inv_scale: Tensor | None = None
    scale: Tensor | None = None
    local_squared_norm: Callable[[], Tensor | None] | None = None
    exact_weight: Callable[[Tensor], Tensor] | None = None

    @property
    def with_gradient(self) -> list[int]:
        """Positions of the parameters with a gradient."""
        return [i for i, p in enumerate(self.layout.parameters) if p.grad is not None]

    def gradients(self, positions: Sequence[int]) -> list[Tensor]:
        """Returns the gradients of these parameters, detached."""
        grads = [self.layout.parameters[i].grad for i in positions]
        return [g.detach() for g in local_parts(grads)]  # type: ignore[arg-type]

    def weights(self, positions: Sequence[int]) -> list[Tensor]:
        """Returns these parameters, detached."""
        return [p.detach() for p in local_parts([self.layout.parameters[i] for i in positions])]

    def exact_weights(self, positions: Sequence[int]) -> list[Tensor]:
        """Returns what the optimizer updates: these parameters, or their float32 master copies."""
        if self.exact_weight is None:
            return self.weights(positions)
        exact = [self.exact_weight(self.layout.parameters[i]) for i in positions]
        return [w.detach() for w in local_parts(exact)]

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold other parts of the same tensors."""
        sharing = self.sharing
        return sharing is not None and not sharing.team.distinct and sharing.team.has_dtensors

    def weight_of_each(self) -> list[float]:
        """Returns for each parameter 1 / (the number of ranks that hold the same elements)."""
        n = len(self.layout.parameters)
        if self.sharing is None:
            return [1.0] * n
        weights, classes = self.sharing.weights, self.sharing.classes
        return [weights[0]] * n if classes is None else [weights[c] for c in classes]


@dataclass(slots=True)
class Reading:
    """The values of a quantity in one step.

    Attributes:
        values: float64 `(n,)`, on the device of the decision.
        results: Returns entries for `StepRecord.watch`, from the values as floats and the decision.
        sums_over_ranks: Whether the values are summed over the ranks.
        after_update: Returns new values after the optimizer has stepped; None: they don't change.
    """

    values: Tensor
    results: Callable[[list[float], Known], dict[str, Any]]
    sums_over_ranks: bool = False
    after_update: Callable[[], Tensor] | None = None


ROOM = 110_000
"""Maximum size of an entry in a line of JSON, in bytes. Four entries and the rest of a record stay
below 512 KiB, the longest line that readers accept."""


def by_name(names: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    """Returns the values by name, in the given order, rounded to 9 digits.

    If they do not fit into a line of JSON (from about 1500 tensors on), only the largest ones.
    """
    told = {name: float(f"{value:.9g}") for name, value in zip(names, values, strict=True)}
    sizes = {name: len(name.encode("ascii", "backslashreplace")) + 20 for name in told}
    if sum(sizes.values()) <= ROOM:
        return told
    room, kept = ROOM, set()
    for name in sorted(told, key=lambda name: -told[name]):
        room -= sizes[name]
        if room < 0:
            break
        kept.add(name)
    return {name: value for name, value in told.items() if name in kept}


class Quantity(Protocol):
    """A quantity that can be watched."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads gradients and weights; changes nothing and never waits."""
        ...
