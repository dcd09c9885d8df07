"""Losses by name when not every rank gives every loss.

The ranks exchange one vector of fixed layout, so a loss must have the same place in it everywhere,
also where nobody has heard of it: only the last pipeline stage knows the loss, and a batch may lack
a part. The store that every process group has keeps the list of names; a rank that meets a new one
appends it there. No collective, no rank waits for another, and a known name costs a dict lookup.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

PLACES = 12
"""How many losses there may be: with them, and one segment, the vector has 248 bytes."""

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

    @staticmethod
    def of(group: ProcessGroup) -> LossNames:
        """The names of a group, the same object each time."""
        if group not in _of_group:
            _of_group[group] = LossNames(dist.distributed_c10d._get_process_group_store(group))
        return _of_group[group]

    def places(self, names: Sequence[str]) -> list[int]:
        """The place of each name; new ones get the next free places.

        Raises:
            ValueError: There are more than `PLACES` names.
        """
        for name in names:
            if name not in self._names:
                self._append(name)
        return [self._names.index(name) for name in names]

    def __len__(self) -> int:
        return PLACES

    def __iter__(self) -> Iterator[str]:
        """The name of every place as far as this rank knows it, else an empty one."""
        return itertools.chain(self._names, [""] * (PLACES - len(self._names)))

    def __getitem__(self, place):  # type: ignore[override]
        """The name of a place, asking the store for what other ranks have added."""
        if isinstance(place, int) and len(self._names) <= place < PLACES:
            self._names = self._stored()
        return [*self][place]

    def _append(self, name: str) -> None:
        names = self._stored()
        while name not in names:
            if len(names) == PLACES:
                raise ValueError(
                    f"loss {name!r} is one too many: several ranks join at most {PLACES} losses, "
                    f"and have {', '.join(names)}; give sums of parts instead"
                )
            # Another rank may have been faster: then its list comes back.
            names = self._compare_set(json.dumps(names), json.dumps([*names, name]))
        self._names = names

    def _stored(self) -> list[str]:
        return self._compare_set("", "[]")  # "": the key does not exist yet

    def _compare_set(self, expected: str, desired: str) -> list[str]:
        """The list in the store, `desired` if it was `expected` before."""
        return json.loads(self._store.compare_set(_KEY, expected, desired))
