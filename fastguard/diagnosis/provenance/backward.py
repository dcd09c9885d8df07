"""`BackwardTrace`: finds the autograd node that produced the first non-finite gradient.

Hooks on every node of the graph check its incoming and outgoing gradients. A node is an origin if
its incoming gradients are finite, its outgoing gradients are not, and the bad values reach a leaf
(`torch.where` may discard them on the way). Gradients are computed by `torch.autograd.grad`, which
does not touch `.grad` and its hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastguard.diagnosis.replay.calls import all_finite, floats
from fastguard.diagnosis.replay.tensor_range import TensorRange


@dataclass(frozen=True, slots=True)
class NodeOrigin:
    """A node whose incoming gradients were finite and whose outgoing gradients were not.

    Attributes:
        node: Index of the node in `graph_of`.
        name: `DivBackward0`.
        sequence: The number assigned by autograd, which identifies the forward operation.
        inputs: Ranges of the incoming gradients, then of the saved tensors.
        outputs: Ranges of the outgoing gradients.
        bad_saved: Saved tensors that are not finite.
    """

    node: int
    name: str
    sequence: int
    inputs: tuple[TensorRange, ...]
    outputs: tuple[TensorRange, ...]
    bad_saved: tuple[Tensor, ...]


class BackwardTrace:
    """Runs one backward pass and finds where gradients became non-finite.

    Args:
        loss: A finite scalar, `()`.

    Attributes:
        bad_leaves: Leaves whose gradient is not finite.
        origin: The first origin whose values reached a leaf; None if there is none.
    """

    def __init__(self, loss: Tensor) -> None:
        assert loss.grad_fn is not None
        self._nodes = graph_of(loss.grad_fn)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._origins: dict[int, NodeOrigin] = {}  # keys in the order of execution
        self._bad_edges: dict[int, list[bool]] = {}
        leaves = {i: n.variable for i, n in enumerate(self._nodes) if hasattr(n, "variable")}
        handles = [
            node.register_hook(partial(self._ran, i))
            for i, node in enumerate(self._nodes)
            if i not in leaves
        ]
        try:
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        bad = [
            i
            for i, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and not all(map(all_finite, floats(gradient)))
        ]
        self.bad_leaves: list[Tensor] = [leaves[i] for i in bad]
        arrived = self._above(bad)
        origins = (origin for i, origin in self._origins.items() if i in arrived)
        self.origin: NodeOrigin | None = next(origins, None)

    def _ran(self, i: int, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        edges = [not all(map(all_finite, floats(g))) for g in outgoing]
        self._bad_edges[i] = edges
        if not any(edges) or not all(map(all_finite, floats(incoming))):
            return
        node = self._nodes[i]
        saved = _saved(node)
        inputs = [TensorRange.of("incoming gradient", t) for t in floats(incoming)]
        inputs += [TensorRange.of(name, t) for name, t in saved]
        self._origins[i] = NodeOrigin(
            i,
            node.name().rpartition("::")[2],
            node._sequence_nr(),
            tuple(inputs),
            tuple(TensorRange.of("outgoing gradient", t) for t in floats(outgoing)),
            tuple(t for _, t in saved if not all_finite(t)),
        )

    def _above(self, bad: Iterable[int]) -> set[int]:
        """Returns the nodes from which bad gradients flowed to the given nodes."""
        sources: dict[int, list[int]] = {}
        for i, edges in self._bad_edges.items():
            for is_bad, (node, _) in zip(edges, self._nodes[i].next_functions, strict=False):
                if is_bad and node is not None:
                    sources.setdefault(self._position[node], []).append(i)
        seen, todo = set(bad), list(bad)
        while todo:
            for i in sources.get(todo.pop(), ()):
                if i not in seen:
                    seen.add(i)
                    todo.append(i)
        return seen


def graph_of(root: Any) -> list[Any]:
    """Returns this node and every node that receives its gradients."""
    nodes, seen, todo = [], {root}, [root]
    while todo:
        node = todo.pop()
        nodes.append(node)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return nodes


def _saved(node: Any) -> list[tuple[str, Tensor]]:
    """Returns a node's saved tensors, unless an activation checkpoint has released them."""
    try:
        if hasattr(node, "saved_tensors"):  # the node of a torch.autograd.Function
            found = [(f"saved tensor {i}", t) for i, t in enumerate(node.saved_tensors)]
        else:
            names = [name for name in dir(node) if name.startswith("_saved_")]
            found = [("saved " + n.removeprefix("_saved_"), getattr(node, n)) for n in names]
    except RuntimeError:
        return []
    return [(name, t) for name, value in found for t in floats(value)]
