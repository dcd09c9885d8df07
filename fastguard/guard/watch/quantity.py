"""What a watched quantity is: it reads a step, and tells the step's record what it found.

    Quantity.read(step) -> Reading     device tensors, before the decision; nothing waits
    Reading.tell(numbers, known)       on the host, when the record is made

A reading whose `sums_over_ranks` is set travels in the vector that the ranks exchange anyway: its
values come back as sums over ranks, 8 bytes per value and no other collective.
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
    """The step that a quantity reads. All tensors are what this rank holds.

    Attributes:
        layout: The parameters and their names.
        device: Where the decision is taken, and where the values of a reading must lie.
        sharing: How the ranks share the parameters; None in one process.
        inv_scale: float64 `()`: what the gradients are still to be multiplied by; None: nothing.
        scale: The loss scale of this step, `()`; None: there is none.
        local_squared_norm: Takes the squared norm, `()`, of this rank's gradients before they were
            reduced, with the loss scale in them; None: nothing has seen these.
    """

    layout: Layout
    device: torch.device
    sharing: Sharing | None = None
    inv_scale: Tensor | None = None
    scale: Tensor | None = None
    local_squared_norm: Callable[[], Tensor | None] | None = None

    @property
    def with_gradient(self) -> list[int]:
        """The positions of the parameters that have a gradient."""
        return [i for i, p in enumerate(self.layout.parameters) if p.grad is not None]

    def gradients(self, positions: Sequence[int]) -> list[Tensor]:
        """The gradients of these parameters, detached."""
        grads = [self.layout.parameters[i].grad for i in positions]
        return [g.detach() for g in local_parts(grads)]  # type: ignore[arg-type]

    def weights(self, positions: Sequence[int]) -> list[Tensor]:
        """These parameters, detached."""
        return [p.detach() for p in local_parts([self.layout.parameters[i] for i in positions])]

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold other parts of the same tensors."""
        sharing = self.sharing
        return sharing is not None and not sharing.team.distinct and sharing.team.has_dtensors

    def weight_of_each(self) -> list[float]:
        """Of each parameter, 1 / how many ranks hold the same elements."""
        n = len(self.layout.parameters)
        if self.sharing is None:
            return [1.0] * n
        weights, classes = self.sharing.weights, self.sharing.classes
        return [weights[0]] * n if classes is None else [weights[c] for c in classes]


@dataclass(slots=True)
class Reading:
    """What a quantity has read of one step.

    Attributes:
        values: float64 `(n,)`, on the device of the decision.
        tell: Makes a part of `StepRecord.watch` of the values, as floats, and of the decision.
        sums_over_ranks: Whether the values are added up over the ranks.
        after_update: What the values become when the optimizer has stepped; None: nothing else.
    """

    values: Tensor
    tell: Callable[[list[float], Known], dict[str, Any]]
    sums_over_ranks: bool = False
    after_update: Callable[[], Tensor] | None = None


ROOM = 140_000
"""Bytes of one quantity's values by name in a line of JSON: three times that and the rest of a
record stay below the 512 KiB that readers take for a line."""


def by_name(names: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    """The values by name, in the order given, to 9 digits.

    Where they would not fit into a line of JSON (from some 2000 tensors on), the largest.
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
    """One thing to watch."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads gradients and weights, changes nothing and waits for nothing."""
        ...
