"""The interface of watched quantities: they read a step and add values to its record.

    Quantity.read(step) -> Reading     device tensors, before the decision; never waits
    Reading.results(numbers, known)    on the host, when the record is created

Values of a reading with `sums_over_ranks` become part of the vector that the ranks exchange anyway,
and are replaced with their sums over the ranks. This costs 8 bytes per value and no further
    collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBuckets, bucketize
from fastguard.guard.clip_scope import Layout
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.ranks.dtensors import local_parts
from fastguard.ranks.team import Sharing
from fastguard.stages.contract import Known
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure
from fastguard.stages.watch import read_bits


@dataclass(slots=True)
class WatchedGradients:
    """The step that a quantity reads. All tensors are the local ones of this rank.

    Attributes:
        layout: The parameters and their names.
        buckets: The gradients, as the step measures them.
        stats: The result of the measure stage, of this rank alone.
        device: The device of the decision, and of the values of a reading.
        inv_scale: float64 `()`: the factor that unscales the gradients; None: 1.
        scale: The loss scale of this step, `()`; None: there is none.
        local_squared_norm: Returns the squared norm `()` of this rank's gradients before they were
            reduced, including the loss scale; None: not available.
        optimizer: The optimizer, if it can compute statistics within its update; else None.
        flat_weights: Returns all parameters in few tensors, with zeros between them, or None if
            that is impossible in this step. None: the parameters are separate tensors.
        due: Names of the quantities that read this step.
    """

    layout: Layout
    buckets: GradBuckets
    stats: GradStats
    device: torch.device
    inv_scale: Tensor | None = None
    scale: Tensor | None = None
    local_squared_norm: Callable[[], Tensor | None] | None = None
    optimizer: FusedOptimizer | None = None
    flat_weights: Callable[[], list[Tensor] | None] | None = None
    due: frozenset[str] = frozenset()
    _by_tensor: GradBuckets | None = None
    _bits: tuple[Tensor, Tensor] | None = None

    @property
    def sharing(self) -> Sharing | None:
        """How the ranks share the parameters; None in a single process."""
        return self.buckets.sharing

    @property
    def with_gradient(self) -> list[int]:
        """Positions of the parameters with a gradient."""
        return [i for i, p in enumerate(self.layout.parameters) if p.grad is not None]

    def power_sums(self) -> Tensor:
        """Returns the sum of squares of each unscaled gradient, float64 `(T,)`; 0 if it is None.

        With `clip_scope="tensor"`, the measure stage has already computed these sums.
        """
        stats = self.stats if self._is_by_tensor and self.stats.norm_type == 2.0 else None
        if stats is None:
            stats = measure(self._gradients_by_tensor(), 2.0, self.inv_scale)
        return stats.power_sum

    def nonzero(self) -> Tensor:
        """Returns the number of nonzero elements of each gradient, int64 `(T,)`."""
        return self._read_bits()[0]

    def checksum(self) -> Tensor:
        """Returns the checksum of the gradients, int64 `()`."""
        return self._read_bits()[1]

    def _read_bits(self) -> tuple[Tensor, Tensor]:
        """Counts nonzero elements and computes the checksum once, if a quantity needs them."""
        if self._bits is None:
            nonzero = "tensor_norms" in self.due
            buckets = self._gradients_by_tensor() if nonzero else self.buckets
            checksum = "replica_drift" in self.due
            self._bits = read_bits(buckets, nonzero=nonzero, checksum=checksum)
        return self._bits

    @property
    def _is_by_tensor(self) -> bool:
        """Whether each tensor is a segment of the step."""
        n = len(self.layout.parameters)
        return isinstance(self.layout.segments, range) and self.buckets.n_measured == n

    def _gradients_by_tensor(self) -> GradBuckets:
        if self._is_by_tensor:
            return self.buckets
        if self._by_tensor is None:
            grads = [p.grad for p in self.layout.parameters]
            n = len(grads)
            self._by_tensor = bucketize(grads, segments=range(n), n_segments=n, device=self.device)
        return self._by_tensor

    def all_weights(self) -> list[Tensor]:
        """Returns all parameters, in as few tensors as possible, with zeros between them."""
        weights = None if self.flat_weights is None else self.flat_weights()
        return self.layout.parameters if weights is None else weights

    def weights(self, positions: Sequence[int]) -> list[Tensor]:
        """Returns these parameters, detached."""
        return [p.detach() for p in local_parts([self.layout.parameters[i] for i in positions])]

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
        during_update: A context that is entered while the optimizer steps; None: no context.
        after_update: Returns new values after the optimizer has stepped; None: the values stay.
    """

    values: Tensor
    results: Callable[[list[float], Known], dict[str, Any]]
    sums_over_ranks: bool = False
    during_update: AbstractContextManager[Any] | None = None
    after_update: Callable[[], Tensor] | None = None


ROOM = 110_000
"""Maximum size of an entry in a line of JSON, in bytes. Four entries and the rest of a record stay
below 512 KiB, the longest line that readers accept."""


def by_name(names: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    """Returns the values by name, in the given order, rounded to 9 digits.

    If the values do not fit into a line of JSON (from about 1500 tensors on), only the largest
    values are returned.
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
