"""Traces the update of an optimizer as one graph, with every write masked by the verdict.

    g <- multiplier * (0 if the verdict cleans and g is not finite, else g)   gradients, when read
    x <- old x if found_inf else new x                                        weights and state

The Python code of the optimizer is traced once with placeholders instead of tensors. Tracing
therefore modifies nothing, and an update that cannot be traced is rejected before any change. The
compiled update reads and writes each array once, as it would without masks, and copies no array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer

from fastguard.errors.versions import as_if_compiling
from fastguard.guard.placeholder_optimizer import NUMBERS, Members, OptimizerOfPlaceholders, Place
from fastguard.guard.tensor_settings import (
    Branch,
    TensorSettings,
    python_of_tensors,
)
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype


@dataclass(slots=True)
class Traced:
    """A traced update.

    Attributes:
        graph: The graph; takes `found_inf`, `multiplier`, `clean`, `Members.inputs`, settings.
        read: The names of the settings that the step reads, per param group.
        branches: The comparisons of settings that the graph depends on.
    """

    graph: GraphModule
    read: list[set[str]]
    branches: list[Branch]


def trace(optimizer: Optimizer, members: Members, settings: Mapping[Place, Tensor]) -> Traced:
    """Traces the update of the parameters in `members`.

    Args:
        optimizer: The optimizer; it is not changed.
        members: The parameters to update.
        settings: The settings that become inputs, with a tensor for each.

    Raises:
        NotTraceable: The step cannot be compiled.
        CreatesState: The step can be compiled after its state has been created.
        CountsInPython: The step can be compiled after its counters have been replaced with tensors.
    """
    notes: dict[str, Any] = {}

    def update(found_inf: Tensor, multiplier: Tensor, clean: Tensor, *rest: Tensor) -> tuple:
        n = len(members.params)
        weights, grads = list(rest[:n]), rest[n : 2 * n]
        others = iter(rest[2 * n :])
        states = [{k: next(others) for k in keys} for keys in members.states]
        tensors = dict(zip(settings, others, strict=True))
        for w, g, segment in zip(weights, grads, members.segments, strict=True):
            w.grad = _scaled_and_cleaned(g, multiplier.select(0, segment), clean)
        stand_in = OptimizerOfPlaceholders(optimizer, members, weights, states, tensors)
        written = [*weights, *chain.from_iterable(s.values() for s in states), *tensors.values()]
        before = [t.clone() for t in written]
        versions = [t._version for t in tensors.values()]
        known = [
            (t, place, _number(place.value_in(optimizer.param_groups[place.owner])))
            for place, t in tensors.items()
        ]
        mode = TensorSettings([(t, place, value) for t, place, value in known if value is not None])
        with mode, as_if_compiling(), python_of_tensors(type(optimizer)):
            stand_in.step()
        notes.update(read=stand_in.read, branches=mode.branches)
        after = stand_in.after(written, versions)
        skip = found_inf != 0
        for t, old, new in zip(written, before, after, strict=True):
            if new is not None:
                t.copy_(torch.where(skip, old, new))
        return ()

    device = members.params[0].device
    scalar = torch.zeros((), device=device)
    verdict = scalar, scalar.new_ones(1 + max(members.segments), dtype=torch.float64), scalar
    inputs = [t.detach() for t in (*verdict, *members.inputs(optimizer), *settings.values())]
    graph = make_fx(update, tracing_mode="fake")(*inputs)
    _drop_profiler_ranges(graph)
    return Traced(graph, **notes)


def _drop_profiler_ranges(graph: GraphModule) -> None:
    """Removes the ranges of `record_function`, which dynamo cannot trace."""
    for node in reversed(graph.graph.nodes):
        if getattr(node.target, "namespace", None) == "profiler":
            graph.graph.erase_node(node)
    graph.recompile()


def _number(value: Any) -> float | None:
    """Returns the value if it is a Python number, which can be compared; None for a tensor."""
    return value if type(value) in NUMBERS else None


def _scaled_and_cleaned(grad: Tensor, multiplier: Tensor, clean: Tensor) -> Tensor:
    """Returns a gradient scaled and cleaned as by `fastguard.stages.reference.apply`."""
    wide = factor_dtype(grad.dtype)
    cleaned = torch.where(grad.isfinite() | (clean == 0), grad, 0.0)
    factor = multiplier.to(wide)
    # below this factor, a single multiplication would lose accuracy
    tiny = factor < SMALLEST_FACTOR
    first = torch.where(tiny, SMALLEST_FACTOR, 1.0).to(wide)
    factor = torch.where(tiny, (multiplier / SMALLEST_FACTOR).to(wide), factor)
    return (cleaned.to(wide) * first * factor).to(grad.dtype)
