"""The arguments that must be the same on all ranks, as strings for `fastguard.ranks.agreement`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import has_numbers, watched
from fastguard.guard.clip_scope import limits
from fastguard.guard.compiled_step import CompiledStep
from fastguard.ranks.agreement import COUNTS, Place, check_agreement
from fastguard.ranks.dtensors import local_parts
from fastguard.stages.reference_watch import sum_of_bits

if TYPE_CHECKING:
    from fastguard.guard.guarded import GuardedOptimizer
    from fastguard.ranks.team import Team


def agree(optimizer: GuardedOptimizer) -> None:
    """Checks that all ranks have the same arguments, in the first step and when segments change.

    The check is a collective, which all ranks must join. If the number of segments changed on some
    ranks only, their sums could not be reduced either.
    """
    team, n = optimizer._gradients.team, optimizer._gradients.layout.n_segments
    if optimizer._n_agreed == n or watched():  # there are no values to compare while tracing
        return
    if team is not None:
        check_agreement(arguments_of(optimizer, team), places_of(optimizer, team), team)
    optimizer._n_agreed = n


def arguments_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, str]:
    """Returns the arguments that must agree, as strings by name. All ranks have the same names."""
    groups, scope = optimizer.param_groups, optimizer.clip_scope
    max_norms = [
        None if limit == math.inf else limit for limit in limits(groups, scope, optimizer.max_norm)
    ]
    arguments = {
        "group": optimizer.group and type(optimizer.group).__name__,
        "max_norm": max_norms[0] if len(set(max_norms)) == 1 else max_norms,
        "norm_type": optimizer.norm_type,
        "clip_scope": scope,
        "nonfinite": optimizer.nonfinite,
        "spike": dict(sorted(optimizer.rules.items())),
        "max_consecutive_skips": optimizer.max_consecutive_skips,
        "watch": optimizer.watch and (*optimizer.watch, optimizer.watch_every),
        "the number of param groups": None,
        COUNTS: None,
        "clip_value by param group": None,
        "compile_step": None,
        "flat_parameters": None,
    }
    if scope == "group":
        arguments["the number of param groups"] = len(groups)
    if not team.distinct:  # ranks with distinct tensors have their own groups
        arguments[COUNTS] = [len(g["params"]) for g in groups]
        clamped = [None if g.get("clip_value") is None else float(g["clip_value"]) for g in groups]
        arguments["clip_value by param group"] = clamped
        # These updates round differently, so replicas would diverge even with equal decisions.
        arguments["compile_step"] = isinstance(optimizer._stepper, CompiledStep)
        arguments["flat_parameters"] = optimizer._gradients.with_parameters
    return {name: repr(value) for name, value in arguments.items()}


def places_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, list[Place]] | None:
    """Returns the parameters of each segment, by description; None for scopes with one segment.

    Describes parameters without a name by their values, which waits for a GPU.
    """
    if team.distinct or optimizer.clip_scope in ("global", "unit"):
        return None
    layout = optimizer._gradients.layout
    unnamed = [p for i, p in enumerate(layout.parameters) if layout.names[i] == f"parameter {i}"]
    sums = _sums_of_replicas(unnamed, team)
    all_places = [
        Place(None, tuple(p.shape), *sums[p]) if p in sums else Place(name, tuple(p.shape))
        for name, p in zip(layout.names, layout.parameters, strict=True)
    ]
    if optimizer.clip_scope == "tensor":
        return {f"parameter {i}": [place] for i, place in enumerate(all_places)}
    waiting = iter(all_places)
    return {
        f"a parameter of param group {g}": [next(waiting) for _ in group["params"]]
        for g, group in enumerate(optimizer.param_groups)
    }


def _sums_of_replicas(
    parameters: list[Tensor], team: Team
) -> dict[Tensor, tuple[int | None, int | None]]:
    """Returns checksums of the values and the gradient of each parameter.

    Returns `(None, None)` for parameters that are not replicated on all ranks.
    """
    sums: dict[Tensor, tuple[int | None, int | None]] = dict.fromkeys(parameters, (None, None))
    sharing = team.sharing(parameters)
    classes = sharing.classes or [0] * len(parameters)
    replicas = [
        p
        for p, c in zip(parameters, classes, strict=True)
        if sharing.weights[c] * team.size == 1.0
        and has_numbers(p)
        # A sparse gradient has no checksum; the step itself raises a clear error for sparse
        # gradients.
        and (p if p.grad is None else p.grad).layout is torch.strided
    ]
    if not replicas:
        return sums
    grads = [p if p.grad is None else p.grad for p in replicas]
    # The sums are exact, because new parameters are often constant (ones or zeros).
    found = [sum_of_bits(t.detach()).cpu() for t in local_parts([*replicas, *grads])]
    numbers = torch.stack(found).tolist()
    n = len(replicas)
    for p, values, gradient in zip(replicas, numbers[:n], numbers[n:], strict=True):
        sums[p] = values, -1 if p.grad is None else gradient
    return sums
