"""Losses by name when not every rank gives every loss.

The ranks exchange one vector of fixed layout, so a loss must have the same place in it everywhere,
also where nobody has heard of it: only the last pipeline stage knows the loss, and a batch may lack
a part. The store that every process group has keeps the list of names; a rank that meets a new one
appends it there. No collective, no rank waits for another, and a known name costs a lookup.

The layout cannot grow: the other ranks would have to know before they send, and on a GPU the host
would have to wait to hear of it. So a name that comes when all places are taken shares the last one
with its like, on every rank, and no rank is left waiting by an error of another.
"""

from __future__ import annotations

import itertools
import json
import logging
import weakref
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastguard.errors.plain_text import printable

PLACES = 12
"""Places for losses in the vector: with them, and one segment, it has 248 bytes."""

OWN = PLACES - 1
"""How many losses have a place of their own; the last place is for all others together."""

OTHERS = "other losses"
"""What the last place is called in records."""

log = logging.getLogger("fastguard")

_KEY = "fastguard/losses"
_of_group: weakref.WeakKeyDictionary[ProcessGroup, LossNames] = weakref.WeakKeyDictionary()


class LossNames(Sequence[str]):
    """The names of the losses of a process group, in the order of their places.

    Args:
        store: The store of the group.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._names: list[str] = []
        self._warned = False

    @staticmethod
    def of(group: ProcessGroup) -> LossNames:
        """The names of a group, the same object each time."""
        if group not in _of_group:
            _of_group[group] = LossNames(_store_of(group))
        return _of_group[group]

    def reserve(self, names: Sequence[str]) -> None:
        """Gives losses that rules judge places of their own.

        Raises:
            ValueError: There are none left: a rule cannot judge several losses together.
        """
        late = [name for name, place in zip(names, self.places(names), strict=True) if place == OWN]
        if late:
            raise ValueError(
                f"a rule judges loss {late[0]!r}, which is one too many: several ranks join {OWN} "
                f"losses by name, and have {', '.join(map(printable, self._names))}; drop a "
                "rule, or give sums of parts as one loss"
            )

    def places(self, names: Sequence[str]) -> list[int]:
        """The place of each name: a new one gets the next free place, or the last if none is."""
        for name in names:
            if name not in self._names and name != OTHERS:
                self._enter(name)
        return [self._names.index(name) if name in self._names else OWN for name in names]

    def __len__(self) -> int:
        return PLACES

    def __iter__(self) -> Iterator[str]:
        """The name of every place as far as this rank knows it, else an empty one."""
        return itertools.chain(self._names, [""] * (OWN - len(self._names)), [OTHERS])

    def __getitem__(self, place):  # type: ignore[override]
        """The name of a place, asking the store for what other ranks have added."""
        if isinstance(place, int) and len(self._names) <= place < OWN:
            self._names = self._stored()
        return [*self][place]

    def _enter(self, name: str) -> None:
        if len(self._names) < OWN:  # a full list is for good: the store need not be asked again
            self._append(name)
        if name not in self._names and not self._warned:
            self._warned = True
            log.warning(
                "loss %r is one too many: several ranks join %d losses by name, and have %s. With "
                "all further ones it counts as %r: their sum, which NaN on any rank makes NaN; "
                "give sums of parts to have names for them",
                name,
                OWN,
                ", ".join(self._names),
                OTHERS,
            )

    def _append(self, name: str) -> None:
        names = self._stored()
        while name not in names and len(names) < OWN:
            # Another rank may have been faster: then its list comes back.
            names = self._compare_set(json.dumps(names), json.dumps([*names, name]))
        self._names = names

    def _stored(self) -> list[str]:
        return self._compare_set("", "[]")  # "": the key does not exist yet

    def _compare_set(self, expected: str, desired: str) -> list[str]:
        """The list in the store, `desired` if it was `expected` before."""
        return json.loads(self._store.compare_set(_KEY, expected, desired))


def _store_of(group: ProcessGroup) -> dist.Store:
    """The store of a group. One of the fake backend has no other ranks, and may have a store that
    keeps nothing: its names stay in this process.
    """
    if dist.get_backend(group) == "fake":
        return dist.HashStore()
    return dist.distributed_c10d._get_process_group_store(group)
