"""Whether all ranks were given the same arguments: asked once, at the first step of a guard.

Ranks with different limits, modes or rules take different decisions from the same numbers, and part
without a word; with another number of segments they send vectors of other lengths. So before the
first vector travels, the ranks compare a hash of each argument: one MAX collective over the hashes
and their negatives, 160 bytes, which says to all ranks at once which arguments differ.

Coefficients of single tensors, or of param groups, belong to places in the vector. Ranks that hold
the same parameters in another order would clip each by the norm of another, so with these scopes
names and shapes are compared too, in their order. Names count where all ranks have them; without
names, parameters of one shape cannot be told apart.

What changes later, as a trainer changes `max_norm`, is not looked at: that would cost every step a
collective.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastguard.segments import limits
from fastguard.tensor_kinds import watched

if TYPE_CHECKING:
    from fastguard.optimizer import GuardedOptimizer
    from fastguard.ranks.team import Team

COUNTS = "the number of parameters by param group"

LISTED = 8
"""How many values an error lists, and how many ranks for each."""


def check_agreement(optimizer: GuardedOptimizer, team: Team | None) -> None:
    """Compares the arguments of a guard over its team. Waits for the other ranks, and for a GPU.

    Args:
        optimizer: The guard, at its first step.
        team: Who decides together; None: this process alone, and there is nothing to do.

    Raises:
        ValueError: On all ranks, naming the arguments that differ and their values by rank.
    """
    if team is None or watched():  # under a tracer there are no numbers to compare
        return
    arguments, places = _arguments(optimizer, team), _places(optimizer, team)
    hashed = arguments | {COUNTS: f"{arguments[COUNTS]} {places}"}
    mine = [_hash(value) for value in hashed.values()]
    numbers = torch.tensor(
        [*mine, *(-x for x in mine)],
        dtype=torch.int64,
        device=team.device_for(torch.device("cpu")),
    )
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=team.group)
    highest, lowest = numbers.view(2, -1).tolist()
    if all(high == -low for high, low in zip(highest, lowest, strict=True)):
        return
    everywhere: list[Any] = [None] * team.size
    dist.all_gather_object(everywhere, (arguments, places), group=team.group)
    ranks = dist.get_process_group_ranks(team.group)
    values = {name: [each[name] for each, _ in everywhere] for name in arguments}
    said = [_by_rank(name, of, ranks) for name, of in values.items() if len(set(of)) > 1]
    if not said:
        said = _misplaced([each for _, each in everywhere], ranks)
    if said:
        raise ValueError(
            "the ranks were given different arguments, and would decide apart: "
            f"{'; '.join(said)}. Construct GuardedOptimizer with the same arguments on every rank"
        )


def _arguments(optimizer: GuardedOptimizer, team: Team) -> dict[str, str]:
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


Place = tuple[str | None, tuple[int, ...]]
"""A parameter's name, if it has one, and its shape."""


def _places(optimizer: GuardedOptimizer, team: Team) -> dict[str, list[Place]] | None:
    """The parameters that each coefficient of a narrow scope belongs to, by what errors call it."""
    if team.distinct or optimizer.clip_scope == "global":
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


def _misplaced(everywhere: Sequence[dict[str, list[Place]]], ranks: Sequence[int]) -> list[str]:
    """The first place that ranks fill with different parameters, by rank; nothing: there is none.

    Args:
        everywhere: The places of each rank; all have as many.
        ranks: Their numbers.
    """
    listed = [place for places in everywhere for place in chain(*places.values())]
    named = all(name is not None for name, _ in listed)
    for what in everywhere[0]:
        # In any order within a param group: its coefficient is that of all of them.
        held = [sorted(_described(place, named) for place in places[what]) for places in everywhere]
        for column in zip(*held, strict=True):
            if len(set(column)) > 1:
                return [_by_rank(what, column, ranks)]
    return []


def _described(place: Place, named: bool) -> str:
    name, shape = place
    return f"{name!r} of shape {shape}" if named else f"of shape {shape}"


def _hash(value: str) -> int:
    """56 bits of it, which int64 holds with either sign."""
    data = value.encode(errors="backslashreplace")  # a name may be no UTF-8
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def _by_rank(name: str, values: Sequence[str], ranks: Sequence[int]) -> str:
    """`max_norm is 1.0 on rank 0, 2.0 on ranks 1, 2`."""
    holders: dict[str, list[str]] = {}
    for value, rank in zip(values, ranks, strict=True):
        holders.setdefault(value, []).append(str(rank))
    return f"{name} is " + _listed(
        [
            f"{value} on {'rank' if len(who) == 1 else 'ranks'} {_listed(who)}"
            for value, who in holders.items()
        ]
    )


def _listed(items: Sequence[str]) -> str:
    more = len(items) - LISTED
    return ", ".join(items[:LISTED]) + (f" and {more} more" if more > 0 else "")
