"""`Block` and `Run`: the parts of flat parameters, see `flat_parameters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fastguard.functional.flat_buckets import FlatGradBuckets
from fastguard.functional.flat_layout import FlatBuffer, slot_in

STEP = "step"


@dataclass(slots=True, eq=False)
class Block:
    """The slots of one param group in one gradient buffer.

    Attributes:
        group: The index of the param group.
        ids: Positions of the parameters in `FlatGradBuckets.parameters`.
        bounds: The start of each slot in the block, and the end of the last one, in elements.
        weights, grads: The parameters and their gradients.
        steps: float32 `(n,)`: the step count of each parameter.
        states: The state, one tensor per entry.
    """

    group: int
    ids: list[int]
    bounds: list[int]
    weights: Tensor
    grads: Tensor
    steps: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)

    def slot(self, key: str, j: int, p: Tensor) -> Tensor:
        """Returns a state entry of the j-th parameter; new entries are zero."""
        if key == STEP:
            return self.steps[j]
        if key not in self.states:
            self.states[key] = torch.zeros_like(self.weights)
        return slot_in(self.states[key], self.bounds[j], p)


@dataclass(slots=True, eq=False)
class Run:
    """Parameters `first` to `last` (exclusive) of a block, updated as one tensor.

    Attributes:
        keys: Names of their state entries; empty: no state yet.
        weights: The parameters as one tensor, with their gradients as `.grad`.
        entries: The state of the run, views of the block; None before the first use.
        others: The step counts of all parameters except the first, set together with `entries`.
    """

    block: Block
    first: int
    last: int
    keys: tuple[str, ...]
    weights: Tensor
    entries: dict[str, Tensor] | None = None
    others: Tensor | None = None

    def piece(self, of_block: Tensor) -> Tensor:
        """Returns the slice of a block's tensor that belongs to this run."""
        start = self.block.bounds[self.first]
        return of_block.narrow(0, start, self.block.bounds[self.last] - start)

    def state(self) -> dict[str, Tensor]:
        """Returns the state of the run for the optimizer, with the first parameter's step count."""
        block = self.block
        if self.entries is None:
            self.others = block.steps[self.first + 1 : self.last]
            # set after `others`, so that after an interrupt the next call sets both attributes
            self.entries = {
                key: block.steps[self.first] if key == STEP else self.piece(block.states[key])
                for key in self.keys
            }
        return dict(self.entries)

    def spread_step(self) -> None:
        """Copies the step count of the first parameter to all others of the run."""
        if self.entries is not None and self.others is not None and STEP in self.keys:
            self.others.copy_(self.entries[STEP])


def blocks_of(buffer: FlatBuffer, groups: Sequence[int], flat: FlatGradBuckets) -> Iterator[Block]:
    """Yields the blocks for a gradient buffer.

    Args:
        buffer: The buffer.
        groups: The param group of each parameter of `flat`.
        flat: The gradients that the buffer belongs to.
    """
    edges = [*(flat.views[i].storage_offset() for i in buffer.ids), len(buffer.flat)]
    for group, members in groupby(range(len(buffer.ids)), lambda j: groups[buffer.ids[j]]):
        slots = list(members)
        first, last = slots[0], slots[-1] + 1
        grads = buffer.flat[edges[first] : edges[last]]
        yield Block(
            group,
            buffer.ids[first:last],
            [edge - edges[first] for edge in edges[first : last + 1]],
            torch.empty_like(grads),  # filled with weights by the caller
            grads,
            torch.zeros(last - first, device=grads.device, dtype=torch.float32),
        )
