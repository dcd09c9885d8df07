"""Assigns positions to named losses when not every rank computes every loss.

The ranks exchange a vector of fixed layout, so a loss must have the same position on every rank,
even on ranks that do not compute the loss. For example, only the last pipeline stage has the loss,
and some losses are missing in some batches. The list of names is kept in the store of the process
group; a rank with a new name appends it there. This needs no collective and does not wait for other
ranks; a known name costs one lookup.

The layout cannot grow, since the other ranks would have to know the new layout before they send
their vectors, and on a GPU the host would have to wait for that. When all positions are taken,
further names share the last position on every rank. (An error on one rank would leave the other
ranks waiting.)
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import overload

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastguard.errors.logger import log
from fastguard.errors.plain_text import printable

PLACES = 12
"""Number of positions for losses; with them, the vector of one segment has 248 bytes."""

OWN = PLACES - 1
"""Number of losses with a separate position; all other losses share the last position."""

OTHERS = "other losses"
"""The name of the shared position in records."""

_KEY = "fastguard/losses"
_of_group: weakref.WeakKeyDictionary[ProcessGroup, LossNames] = weakref.WeakKeyDictionary()


class LossNames(Sequence[str]):
    """The names of a process group's losses, in the order of their positions.

    Args:
        store: The store of the group.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._names: list[str] = []
        self._warned = False

    @staticmethod
    def of(group: ProcessGroup) -> LossNames:
        """Returns the names of a group, the same object each time."""
        if group not in _of_group:
            _of_group[group] = LossNames(_store_of(group))
        return _of_group[group]

    def reserve(self, names: Sequence[str]) -> None:
        """Reserves positions for losses that rules judge.

        Raises:
            ValueError: No position is left, and a rule cannot use the sum in the shared position.
        """
        late = [name for name, place in zip(names, self.places(names), strict=True) if place == OWN]
        if late:
            raise ValueError(
                f"no position is left for the rule on loss {late[0]!r}: several ranks combine at "
                f"most {OWN} losses by name, and these are "
                f"{', '.join(map(printable, self._names))}; remove a rule, or combine losses "
                "before passing them"
            )

    def places(self, names: Sequence[str]) -> list[int]:
        """Returns the position of each name; a new one gets the next free position, or the last."""
        for name in names:
            if name not in self._names and name != OTHERS:
                self._enter(name)
        return [self._names.index(name) if name in self._names else OWN for name in names]

    def __len__(self) -> int:
        return PLACES

    def __iter__(self) -> Iterator[str]:
        """Yields the name of each position; an empty string if this rank does not know it."""
        return itertools.chain(self._names, [""] * (OWN - len(self._names)), [OTHERS])

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        """Returns the name of a position; reads the store if this rank does not know it."""
        if isinstance(place, int) and len(self._names) <= place < OWN:
            self._names = self._stored()
        return [*self][place]

    def _enter(self, name: str) -> None:
        if len(self._names) < OWN:  # a full list of names never changes
            self._append(name)
        if name not in self._names and not self._warned:
            self._warned = True
            log.warning(
                "no position is left for loss %r: several ranks combine at most %d losses by "
                "name, and these are %s. This loss and all further losses are recorded together "
                "as %r, which is their sum, and NaN if any of them is NaN on any rank. To record "
                "losses by name, pass fewer losses, for example sums of several",
                name,
                OWN,
                ", ".join(self._names),
                OTHERS,
            )

    def _append(self, name: str) -> None:
        names = self._stored()
        while name not in names and len(names) < OWN:
            # If another rank was faster, the store returns the list of that rank.
            names = self._compare_set(json.dumps(names), json.dumps([*names, name]))
        self._names = names

    def _stored(self) -> list[str]:
        return self._compare_set("", "[]")  # "" means that the key does not exist yet

    def _compare_set(self, expected: str, desired: str) -> list[str]:
        """Sets the stored list to `desired` if it equals `expected`; returns the stored list."""
        return json.loads(self._store.compare_set(_KEY, expected, desired))


def _store_of(group: ProcessGroup) -> dist.Store:
    """Returns the store of a group.

    With the fake backend there are no other ranks, and the store may keep nothing, so the names are
    kept in this process.
    """
    if dist.get_backend(group) == "fake":
        return dist.HashStore()
    return dist.distributed_c10d._get_process_group_store(group)
