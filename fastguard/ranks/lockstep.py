"""`Peers`: ranks that perform an operation together; if it fails on one, it fails on all.

The ranks exchange a few hundred bytes per save or rollback, and nothing during a step. A single
process exchanges nothing.
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
    """The ranks of a process group, or a single process.

    Args:
        group: The group; None: this process only.

    Raises:
        TypeError: `group` is not a process group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if group is not None and not _is_group(group):
            raise TypeError(
                f"group={shown(group)} must be None or a torch.distributed.ProcessGroup, such as "
                "torch.distributed.group.WORLD after init_process_group"
            )
        self.group = group
        self.rank: int = 0 if group is None else torch.distributed.get_rank(group)
        self.size: int = 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes shared data."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in order; every rank passes a picklable value."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; if it fails on any rank, all ranks raise the first error."""
        if self.size == 1:
            return work()
        result, error = _attempt(work)
        errors = self.gather(error)
        _raise_first(errors)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its result, or raises its error, on every rank."""
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
        return None, _picklable(error)


def _picklable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with the same text if it cannot be pickled."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    except Exception:  # pickling a foreign class may raise any error
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first(errors: list[Exception | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            error.add_note(f"on rank {rank}")
            raise error
