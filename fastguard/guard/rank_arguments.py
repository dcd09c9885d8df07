"""What all ranks must be given alike, as `fastguard.ranks.agreement` compares it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastguard.guard.clip_scope import limits
from fastguard.ranks.agreement import COUNTS, Place

if TYPE_CHECKING:
    from fastguard.guard.guarded import GuardedOptimizer
    from fastguard.ranks.team import Team


def arguments_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, str]:
    """What all ranks must have alike, as text; the same names on every rank."""
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
    if not team.distinct:  # else each rank has tensors of its own, in groups of its own
        arguments[COUNTS] = [len(g["params"]) for g in groups]
        clamped = [None if g.get("clip_value") is None else float(g["clip_value"]) for g in groups]
        arguments["clip_value by param group"] = clamped
    return {name: repr(value) for name, value in arguments.items()}


def places_of(optimizer: GuardedOptimizer, team: Team) -> dict[str, list[Place]] | None:
    """The parameters that each coefficient of a narrow scope belongs to, by what errors call it."""
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
