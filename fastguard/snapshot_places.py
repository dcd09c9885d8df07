"""Where `Rollback` keeps its snapshots: host memory, or a `CheckpointStore` on disk.

Both take one, and go back to the newest that is finite on every rank: all ranks to the same one, or
none.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from fastguard.checkpoints import CheckpointError, CheckpointStore
from fastguard.optimizer import GuardedOptimizer
from fastguard.peers import Peers
from fastguard.snapshot import Snapshot

log = logging.getLogger("fastguard")

POSITION = "position"
"""Name of the data position in a checkpoint of `Rollback`."""


class NothingToRestore(RuntimeError):
    """No snapshot can be gone back to; the message says why."""


class Taken(NamedTuple):
    """A snapshot.

    Attributes:
        step: Number of the optimizer step after which it was taken.
        position: Where the data stood then, as the caller said.
    """

    step: int
    position: Any


class Place(Protocol):
    """A place for snapshots."""

    def steps(self) -> list[int]:
        """The steps of the snapshots that may be gone back to, oldest first."""
        ...

    def take(self, objects: Mapping[str, Any], step: int, position: Any) -> bool:
        """Keeps the state of the objects; False if that failed, and was logged."""
        ...

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        """Gives the objects the newest finite state.

        Raises:
            NothingToRestore: There is none.
        """
        ...


class InMemory:
    """Snapshots in host memory; the oldest beyond `keep` is overwritten.

    Args:
        optimizer: Steps only when the latest copy is complete, which it waits for on the device.
        keep: How many are kept.
        peers: The ranks that go back together.
    """

    def __init__(self, optimizer: GuardedOptimizer, keep: int, peers: Peers) -> None:
        self._optimizer = optimizer
        self._keep = keep
        self._peers = peers
        self._slots: deque[Snapshot] = deque()
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait_for_copy)

    def steps(self) -> list[int]:
        return [slot.step for slot in self._slots if slot.step is not None]

    def take(self, objects: Mapping[str, Any], step: int, position: Any) -> bool:
        full = len(self._slots) >= self._keep
        slot = self._slots.popleft() if full else Snapshot()
        self._copied = slot.take(objects, step, position, self._optimizer)
        self._slots.append(slot)
        return True

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        refused = []
        while self._slots:
            slot = self._slots[-1]
            bad = {name for names in self._peers.gather(slot.nonfinite()) for name in names}
            if not bad:
                self._peers.together(lambda slot=slot: slot.restore(objects))
                return Taken(slot.step or 0, slot.position)
            refused.append(f"step {slot.step}: {', '.join(sorted(bad)[:8])}")
            self._slots.pop()
        raise NothingToRestore(f"no snapshot is finite: {'; '.join(refused)}")

    def _wait_for_copy(self, *_: Any) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


class InStore:
    """Snapshots in a `CheckpointStore`, which a restarted process can go on from.

    The store checks each one after writing it, keeps as many as it was told, and logs what the disk
    does to it; the run goes on.

    Args:
        store: The store; its ranks go back together.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    def steps(self) -> list[int]:
        return [entry.step for entry in self._store.list() if entry.clean]

    def take(self, objects: Mapping[str, Any], step: int, position: Any) -> bool:
        return self._store.save({**objects, POSITION: position}, step=step) is not None

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        try:
            checkpoint = self._store.load("last-clean", objects)
        except (CheckpointError, OSError) as error:
            where = self._store.directory
            raise NothingToRestore(f"{where} has no usable snapshot: {error}") from error
        try:
            self._store.rollback()  # what came after it is put aside: those steps are done again
        except (CheckpointError, OSError) as error:
            log.error(
                "the run went back to step %d, but %s still lists what came after it: %s",
                checkpoint.step,
                self._store.directory,
                error,
            )
        return Taken(checkpoint.step, checkpoint.state.get(POSITION))
