"""Checks at the first step of a guard that all ranks were given the same arguments.

With different limits, modes or rules, ranks would make different decisions from the same numbers,
and the replicas would silently diverge. With different numbers of segments, even the vectors that
the ranks exchange would differ in length. Therefore the ranks first compare a hash of each
argument: one MAX collective over the hashes and their negatives, 208 bytes, shows every rank which
arguments differ.

If each tensor or param group has its own clip coefficient, each coefficient has a position in the
vector. Ranks with the same parameters in a different order would clip a parameter by the norm of
another one, so the order of the parameters is compared too: by name and shape if all ranks have
names. Without names, replicas are compared by checksums of their values and gradients; shards of
the same shape cannot be distinguished.

The ranks compare again when the number of segments changes, for example because parameters were
added. Other changes, such as a new `max_norm`, are not checked, since that would need a collective
per step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from fastguard.errors import several

if TYPE_CHECKING:
    from fastguard.ranks.team import Team

COUNTS = "the number of parameters by param group"

LISTED = 8
"""Number of values that an error lists, and number of ranks for each value."""


class Place(NamedTuple):
    """A parameter, as the ranks compare it.

    Attributes:
        name: The name of the parameter; None: there is none.
        shape: The shape of the parameter.
        values, gradient: Checksums, which must be equal on all ranks; None if the parameter has a
            name, or if the ranks hold different parts of it.
    """

    name: str | None
    shape: tuple[int, ...]
    values: int | None = None
    gradient: int | None = None

    def by_name(self) -> str:
        """Describes the parameter by its name and shape."""
        return f"{self.name!r} of shape {self.shape}"

    def by_sums(self, names: Sequence[str]) -> str:
        """Describes the parameter by its shape and some of its checksums."""
        sums = [f"{name} {getattr(self, name):x}" for name in names]
        return f"of shape {self.shape}" + (f" (checksum of {', '.join(sums)})" if sums else "")


def check_agreement(
    arguments: Mapping[str, str], places: Mapping[str, list[Place]] | None, team: Team
) -> None:
    """Compares the arguments of a guard over its team. Waits for the other ranks and the GPU.

    Args:
        arguments: Arguments that must be equal on all ranks, as strings by name, including
            `COUNTS`. Every rank passes the same names.
        places: With several coefficients, the parameters in the order of the coefficients, by
            description for errors. None: there is only one coefficient.
        team: The ranks that decide together.

    Raises:
        ValueError: Arguments differ. All ranks raise this error, which lists the values by rank.
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
            "the ranks were given different arguments and would make different decisions: "
            f"{'; '.join(said)}. Construct GuardedOptimizer with the same arguments on every rank"
        )


def _misplaced(everywhere: Sequence[dict[str, list[Place]]], ranks: Sequence[int]) -> list[str]:
    """Describes the first position with different parameters, by rank; empty if there is none.

    Args:
        everywhere: The positions on each rank, equal in number.
        ranks: The numbers of the ranks.
    """
    for described in _descriptions([[*chain(*places.values())] for places in everywhere]):
        for what in everywhere[0]:
            # Names are sorted, since the order within a param group, which has one coefficient, is
            # irrelevant.
            held = [sorted(map(described, places[what])) for places in everywhere]
            for column in zip(*held, strict=True):
                if len(set(column)) > 1:
                    return [_by_rank(what, column, ranks)]
    return []


def _descriptions(everywhere: Sequence[Sequence[Place]]) -> Iterator[Callable[[Place], str]]:
    """Yields functions that describe parameters; equal parameters get equal descriptions.

    Checksums that differ between ranks, as after a NaN in the gradients of one rank, say nothing
    about the order and are left out.
    """
    if all(place.name is not None for places in everywhere for place in places):
        yield Place.by_name
        return
    yield lambda place: place.by_sums(())
    for names in (("values", "gradient"), ("values",), ("gradient",)):
        keys = [[(p.shape, *(getattr(p, n) for n in names)) for p in held] for held in everywhere]
        known = all(None not in key for held in keys for key in held)
        if known and all(Counter(held) == Counter(keys[0]) for held in keys):
            yield lambda place, names=names: place.by_sums(names)
            return


def _hash(value: str) -> int:
    """Returns 56 bits of a hash, so that int64 can hold it and its negative."""
    data = value.encode(errors="backslashreplace")  # a name may be invalid UTF-8
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def _by_rank(name: str, values: Sequence[str], ranks: Sequence[int]) -> str:
    """Formats `max_norm is 1.0 on rank 0, 2.0 on ranks 1, 2`."""
    holders: dict[str, list[str]] = {}
    for value, rank in zip(values, ranks, strict=True):
        holders.setdefault(value, []).append(str(rank))
    values_on = [
        f"{value} on {'rank' if len(owners) == 1 else 'ranks'} {several(owners, LISTED)}"
        for value, owners in holders.items()
    ]
    return f"{name} is {several(values_on, LISTED)}"
