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
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from fastguard.ranks.team import Team

COUNTS = "the number of parameters by param group"

LISTED = 8
"""How many values an error lists, and how many ranks for each."""


Place = tuple[str | None, tuple[int, ...]]
"""A parameter's name, if it has one, and its shape."""


def check_agreement(
    arguments: Mapping[str, str], places: Mapping[str, list[Place]] | None, team: Team
) -> None:
    """Compares the arguments of a guard over its team. Waits for the other ranks, and for a GPU.

    Args:
        arguments: What all ranks must have alike, as text, `COUNTS` among them; the same names on
            every rank.
        places: The parameters that each coefficient of a narrow scope belongs to, by what errors
            call it; None: there is one coefficient.
        team: The ranks that decide together.

    Raises:
        ValueError: On all ranks, naming the arguments that differ and their values by rank.
    """
    hashed = {**arguments, COUNTS: f"{arguments[COUNTS]} {places}"}
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
