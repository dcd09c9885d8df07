"""Storage for the snapshots of `Rollback`: host memory, or a `CheckpointStore` on disk.

Both kinds of storage take snapshots and restore the newest snapshot that is finite on every rank.
All ranks restore the same snapshot, or none does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from fastguard.checkpoints import CheckpointError, CheckpointStore
from fastguard.checkpoints.object_states import plain
from fastguard.errors.logger import log
from fastguard.gradients.host_copies import check_copyable
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.weak_hooks import hook_weakly
from fastguard.ranks.lockstep import Peers
from fastguard.recovery.incident_log import Moment
from fastguard.recovery.snapshot import Snapshot

POSITION = "position"
"""The name under which a checkpoint of `Rollback` holds the data position."""


class NothingToRestore(RuntimeError):
    """No snapshot can be restored; the message says why."""


class Taken(NamedTuple):
    """When a restored snapshot was taken.

    Attributes:
        moment: The optimizer step after which it was taken.
        position: The data position at that step, as given by the caller.
    """

    moment: Moment
    position: Any


class SnapshotStorage(Protocol):
    """Takes and restores snapshots."""

    def moments(self) -> list[Moment]:
        """Returns the moments of the restorable snapshots, oldest first."""
        ...

    def check(self, state: Any, path: str) -> None:
        """Raises a TypeError or ValueError that names the first value that cannot be saved."""
        ...

    def take(self, objects: Mapping[str, Any], moment: Moment, position: Any) -> bool:
        """Saves the state of the objects; if that fails, logs it and returns False."""
        ...

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        """Restores the newest finite state.

        Raises:
            NothingToRestore: There is none.
        """
        ...


def group_sizes(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Returns the number of parameters per param group, which a loaded state must match."""
    return tuple(len(group["params"]) for group in optimizer.param_groups)


class _Slot(Snapshot):
    """A snapshot with its moment and the results of its checks.

    Attributes:
        moment: When it was taken.
        sizes: The `group_sizes` at that time.
        checked: Whether the first part (`snapshot.CHECKED_SHARE`) was checked during the copy.
        bad: The non-finite tensors on any rank; None: not determined yet.
    """

    moment = Moment(0, 0)
    sizes: tuple[int, ...] = ()
    checked = False
    bad: list[str] | None = None


class InMemory:
    """Snapshots in host memory; when there are `keep`, a new one overwrites the oldest.

    There is one exception. If `keep` is more than 1 and the oldest snapshot may be the only finite
    one, it is kept, so that unusable snapshots (for example with NaN in an EMA) cannot displace it.
    The new snapshot then overwrites the newest one, and most of it is checked during the copy; the
    rest is checked at the next snapshot. As a result, every second snapshot is checked.

    Args:
        optimizer: The optimizer; its next step waits on the device for the latest copy.
        keep: Number of snapshots to keep.
        peers: The ranks that roll back together.
    """

    def __init__(self, optimizer: GuardedOptimizer, keep: int, peers: Peers) -> None:
        self._optimizer = optimizer
        self._keep = keep
        self._peers = peers
        self._slots: deque[_Slot] = deque()
        self._copied: Mapping[torch.device, torch.cuda.Event] = {}
        # The hook holds a weak reference, so that it does not keep the snapshots in memory for the
        # optimizer's lifetime.
        hook_weakly(optimizer.register_step_pre_hook, self._wait_for_copy)

    def moments(self) -> list[Moment]:
        """Returns the moments of the restorable snapshots, oldest first."""
        return [slot.moment for slot in self._slots if slot.step is not None]

    def check(self, state: Any, path: str) -> None:
        """Checks that a state can be saved; see `SnapshotStorage.check`."""
        check_copyable(state, path)

    def take(self, objects: Mapping[str, Any], moment: Moment, position: Any) -> bool:
        """Saves the state of the objects; see `SnapshotStorage.take`."""
        others = [*self._slots][1:]  # all slots but the oldest
        safe = self._keep == 1 or any(slot.checked and not self._bad(slot) for slot in others)
        if len(self._slots) < self._keep:
            slot = _Slot()
        else:
            slot = self._slots.popleft() if safe else self._slots.pop()
        slot.moment, slot.bad, slot.checked = moment, None, not safe
        slot.sizes = group_sizes(self._optimizer)
        self._copied = slot.take(
            objects, moment.step, position, self._optimizer, check=slot.checked
        )
        self._slots.append(slot)
        return True

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        """Restores the newest finite state; see `SnapshotStorage.restore`."""
        refused = []
        what = "is finite"
        while self._slots:
            slot = self._slots[-1]
            fits = slot.sizes == group_sizes(self._optimizer)
            bad = self._bad(slot) if fits else ["taken with other param groups"]
            what = what if fits else "can be restored"
            if not bad:
                self._peers.together(lambda slot=slot: slot.restore(objects))
                return Taken(slot.moment, slot.position)
            refused.append(f"step {slot.step}: {', '.join(bad[:8])}")
            self._slots.pop()
        if not refused:
            raise NothingToRestore(
                "there is no snapshot: the model has had no values to copy (lazy modules before "
                "the first step, or FakeTensorMode)"
            )
        raise NothingToRestore(f"no snapshot {what}: {'; '.join(refused)}")

    def _bad(self, slot: _Slot) -> list[str]:
        """Returns the non-finite tensors in a snapshot, on any rank."""
        if slot.bad is None:
            found = self._peers.gather(slot.nonfinite())
            slot.bad = sorted({name for names in found for name in names})
            if slot.bad:
                log.warning(
                    "the snapshot of step %s is not finite and is never restored: %s. If these "
                    "tensors are buffers, fastguard.protect_buffers(model, optimizer) keeps them "
                    "finite",
                    slot.step,
                    ", ".join(slot.bad[:8]),
                )
        return slot.bad

    def _wait_for_copy(self) -> None:
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._copied = {}


class InStore:
    """Snapshots in a `CheckpointStore`, from which a restarted process can continue.

    The store verifies each snapshot after writing it; the arguments of the store determine how many
    snapshots it keeps. Disk errors are logged, and the run continues.

    Args:
        store: The store, whose ranks roll back together.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._moments: dict[int, Moment] = {}  # by step; only those saved by this process

    def moments(self) -> list[Moment]:
        """Returns the moments of the restorable snapshots, oldest first."""
        return [self._moment(entry.step) for entry in self._store.list() if entry.clean]

    def check(self, state: Any, path: str) -> None:
        """Checks that a state can be saved; see `SnapshotStorage.check`."""
        plain(state, path)

    def take(self, objects: Mapping[str, Any], moment: Moment, position: Any) -> bool:
        """Saves the state of the objects; see `SnapshotStorage.take`."""
        if self._store.save({**objects, POSITION: position}, step=moment.step) is None:
            return False
        self._moments[moment.step] = moment
        self._moments = {known.step: known for known in self.moments()}
        return True

    def restore(self, objects: Mapping[str, Any]) -> Taken:
        """Restores the newest finite state; see `SnapshotStorage.restore`."""
        try:
            checkpoint = self._store.load("last-clean", objects)
        except (CheckpointError, OSError) as error:
            where = self._store.directory
            raise NothingToRestore(f"{where} has no usable snapshot: {error}") from error
        try:
            # The steps of later checkpoints will be repeated, so these checkpoints are set aside.
            self._store.rollback()
        except (CheckpointError, OSError) as error:
            log.error(
                "the run went back to step %d, but %s still lists later checkpoints: %s",
                checkpoint.step,
                self._store.directory,
                error,
            )
        return Taken(self._moment(checkpoint.step), checkpoint.state.get(POSITION))

    def _moment(self, step: int) -> Moment:
        return self._moments.get(step, Moment(0, step))
