"""The arguments that must be the same on all ranks, as text for `fastguard.ranks.agreement`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastguard.guard.clip_scope import limits
from fastguard.ranks.agreement import COUNTS, Place

if TYPE_CHECKING:
    from fastguard.guard.guarded import GuardedOptimizer
    from fastguard.ranks.team import Team


def arguments_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, str]:
    """Returns the arguments that must agree, as text by name; with the same names on all ranks."""
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
    }
    if scope == "group":
        arguments["the number of param groups"] = len(groups)
    if not team.distinct:  # otherwise each rank has its own tensors and groups
        arguments[COUNTS] = [len(g["params"]) for g in groups]
        clamped = [None if g.get("clip_value") is None else float(g["clip_value"]) for g in groups]
        arguments["clip_value by param group"] = clamped
    return {name: repr(value) for name, value in arguments.items()}


def places_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, list[Place]] | None:
    """Returns the parameters of each segment, by description; None for scopes with one segment."""
    if team.distinct or optimizer.clip_scope in ("global", "unit"):
        return None
    layout = optimizer._gradients.layout
    named = enumerate(zip(layout.names, layout.parameters, strict=True))
    all_places: list[Place] = [
        (None if name == f"parameter {i}" else name, tuple(p.shape)) for i, (name, p) in named
    ]
    if optimizer.clip_scope == "tensor":
        return {f"parameter {i}": [place] for i, place in enumerate(all_places)}
    waiting = iter(all_places)
    return {
        f"a parameter of param group {g}": [next(waiting) for _ in group["params"]]
        for g, group in enumerate(optimizer.param_groups)
    }
