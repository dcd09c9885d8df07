"""`Peers`: the processes of a run that do the same thing, or none of them does.

What is exchanged here are verdicts and entries of a manifest, a few hundred bytes at a save or a
rollback; nothing of it lies on the road of a step. One process alone exchanges nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastguard.errors.plain_text import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Peers:
    """The ranks of a process group, or one process alone.

    Args:
        group: The group; None: this process alone.

    Raises:
        TypeError: It is no process group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if group is not None and not _is_group(group):
            raise TypeError(
                f"group={shown(group)} must be None or a torch.distributed.ProcessGroup, such as "
                "torch.distributed.group.WORLD after init_process_group"
            )
        self.group = group
        self.rank = 0 if group is None else torch.distributed.get_rank(group)
        self.size = 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what there is only one of."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Each rank calls it, with something that pickles."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """Does something on every rank; if it fails on any, that error is raised on all."""
        if self.size == 1:
            return work()
        result, error = _attempt(work)
        errors = self.gather(error)
        _raise_first(errors)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from `work()`, on every rank; its error too."""
        if self.size == 1:
            return work()
        outcome = [_attempt(work) if self.is_first else (None, None)]
        torch.distributed.broadcast_object_list(outcome, group_src=0, group=self.group)
        result, error = outcome[0]
        _raise_first([error])
        return result  # type: ignore[return-value]


def _is_group(group: object) -> bool:
    return torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, _that_travels(error)


def _that_travels(error: Exception) -> Exception:
    """The error, or if it does not pickle, one that says the same."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    except Exception:  # whatever a foreign class does when it is pickled
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first(errors: list[Exception | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            error.add_note(f"on rank {rank}")
            raise error
