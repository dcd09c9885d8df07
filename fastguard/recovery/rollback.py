"""`Rollback`: restores the last good state, without a restart, when skipping is not enough.

Once per `every` applied steps, the state of the model, the optimizer and all other objects with
a `state_dict` is saved in host memory or in a `CheckpointStore`. When too many steps in a row are
skipped or spike, or on request, the newest snapshot without NaN or Inf is loaded, the learning rate
is lowered, and the caller learns where to continue and which data to leave out. After
`max_attempts` rollbacks without progress, an error with the history is raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastguard.checkpoints import CheckpointStore
from fastguard.errors import TrainingDivergedError, plural
from fastguard.errors.logger import log
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.grad_scaler import keep_lower_scales
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.weak_hooks import hook_weakly
from fastguard.ranks.lockstep import Peers
from fastguard.recovery.guarded_lr import GuardedLR
from fastguard.recovery.incident_log import IncidentLog
from fastguard.recovery.rollback_arguments import check_arguments, tensors_of, with_own
from fastguard.recovery.snapshot_stores import (
    InMemory,
    InStore,
    NothingToRestore,
    SnapshotStorage,
    group_sizes,
)


@dataclass(frozen=True, slots=True)
class Rewind:
    """Where the training loop should continue after a rollback.

    Attributes:
        step: The optimizer step whose state was restored.
        position: The data position that was passed to `Rollback.step` at that step.
        skip: Positions of the bad steps since then, in order; their data should be left out.
        reason: The reason for the rollback.
        attempt: How many rollbacks there have been for the same problem, including this one.
    """

    step: int
    position: Any
    skip: tuple[Any, ...]
    reason: str
    attempt: int


class Rollback:
    """Takes snapshots of the training state, and restores one when training goes wrong.

    With several ranks, every rank must construct a `Rollback` and call its methods at the same
    steps. Either all ranks restore the same snapshot, or none does. Tensor learning rates are
    restored in place. A rollback never raises the scale of a `GradScaler`, since a higher scale
    would only overflow again.

    Once a param group has been added, earlier snapshots can no longer be loaded, so a snapshot is
    taken after the next good step.

    Once a state has been loaded into the optimizer, earlier steps no longer count, and a snapshot
    is taken after the next good step. Until then, a rollback would restore a snapshot from before
    the load. To avoid this, call `snapshot` once everything is loaded.

    With a fused optimizer on a GPU, whose steps do not sync, `Rollback` acts on the verdict of step
    k in step k + 1. It waits only for the verdict of a step after which a snapshot may be taken.

    Args:
        optimizer: The guarded optimizer, which is part of every snapshot.
        objects: The other objects of the run, by name, such as model, scheduler, GradScaler, EMA
            and data loader; each has `state_dict` and `load_state_dict`. Random number generators
            are always included.
        every: Applied steps between snapshots. A snapshot is postponed until a step without an
            incident, for at most `every` more applied steps. After that, it may also follow a step
            that was applied despite an incident (cleaned, or with a spike while `after_spikes` is
            None). Default: 100.
        keep: Number of snapshots kept in host memory; a `store` has its own setting. Default: 2.
        after_skips: Number of consecutive skipped steps that triggers a rollback; None: no limit.
            Steps skipped only to lower a loss scale do not count. Default: 5.
        after_spikes: Number of consecutive steps with a spike (recorded, clipped or skipped) that
            triggers a rollback; None: no limit. Default: None.
        lr: The schedule to lower at a rollback. Default: None.
        lr_factor: The factor by which the learning rate is lowered, in (0, 1]. Default: 0.5.
        max_attempts: Number of rollbacks for the same problem before an error is raised; the count
            restarts at a snapshot beyond the problem. Default: 3.
        store: A store with a separate directory for the snapshots, instead of host memory. A store
            is slower, but a restarted process can load the snapshots with `store.load("last-clean",
            ...)`, under the names in `objects`, `optimizer`, `lr`, and `position` for the data
            position. If the disk fails, the error is logged and the run continues. Default: None.
        position: The current data position, for the first snapshot, which is taken at once; see
            `step`. Default: None.

    Raises:
        TypeError, ValueError: An argument has an invalid type or value.

    Example:
        >>> import torch, fastguard
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> rollback = fastguard.Rollback(opt, {"model": model}, every=1, after_skips=2)
        >>> before = model.weight.detach().clone()
        >>> for batch in range(2):
        ...     opt.step(loss=float("nan"))
        ...     rewind = rollback.step(position=batch)
        >>> rewind.skip, rewind.reason
        ((0, 1), '2 steps in a row were skipped')
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        objects: Mapping[str, Any],
        *,
        every: int = 100,
        keep: int = 2,
        after_skips: int | None = 5,
        after_spikes: int | None = None,
        lr: GuardedLR | None = None,
        lr_factor: float = 0.5,
        max_attempts: int = 3,
        store: CheckpointStore | None = None,
        position: Any = None,
    ) -> None:
        check_arguments(
            optimizer,
            lr,
            lr_factor,
            store,
            after_skips,
            after_spikes,
            every=every,
            keep=keep,
            max_attempts=max_attempts,
        )
        self.optimizer = optimizer
        self.objects: dict[str, Any] = with_own(objects, optimizer, lr)
        self.lr: GuardedLR | None = lr
        self.lr_factor: float = lr_factor
        self.max_attempts = max_attempts
        self.attempts: int = 0
        self._problem_until = 0
        self._is_state_checked = False
        self._inbox = optimizer.subscribe()
        # (number of steps taken when `step` was called, position)
        self._positions: deque[tuple[int, Any]] = deque()
        self._incidents = IncidentLog(every, after_skips, after_spikes)
        hook_weakly(optimizer.register_load_state_dict_post_hook, self._forget_steps_before_load)
        self._sizes = group_sizes(optimizer)
        self._storage: SnapshotStorage
        if store is None:
            self._storage = InMemory(optimizer, keep, Peers(optimizer.process_group))
        else:
            self._storage = InStore(store)
        # The position of the first snapshot, kept while the model has no values to copy.
        self._first: tuple[Any] | None = None
        if _resumed(optimizer, store):
            return
        if self._has_nothing_to_copy():
            self._first = (position,)
            hook_weakly(optimizer.register_step_pre_hook, self._take_first)
        else:
            self.snapshot(position)

    @property
    def every(self) -> int:
        """Applied steps between snapshots."""
        return self._incidents.every

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks in total; `attempts` counts those for the current problem."""
        return self._incidents.rollbacks

    @property
    def snapshots(self) -> list[int]:
        """Steps of the available snapshots, oldest first."""
        return [moment.step for moment in self._storage.moments()]

    def step(self, position: Any = None) -> Rewind | None:
        """Processes the steps since the last call. Call this after every `optimizer.step`.

        One call may also cover several steps. It waits for the verdict of the last step only if
        this verdict decides whether to take a snapshot now.

        Args:
            position: The current data position: any value that identifies this batch. With a
                `store`, it must be a number, a string, or a container of them. Default: None.

        Returns:
            None, or after a rollback, where to continue.

        Raises:
            TrainingDivergedError: `max_attempts` rollbacks did not solve the problem, or no
                snapshot is finite.
            TypeError, ValueError: In the first step: the optimizer has state that cannot be copied.
        """
        if self._sizes != (sizes := group_sizes(self.optimizer)):
            # parameters were added, so earlier snapshots can no longer be loaded
            self._sizes = sizes
            self._incidents.make_due()
        self._positions.append((self.optimizer.steps_taken, position))
        reason = self._learn_all()
        if reason is None and self._incidents.is_due_after(1):
            # Fetches records only for this inbox, so that other subscribers get theirs at the usual
            # time.
            self._inbox.settle()
            reason = self._learn_all()
        if reason is not None:
            return self.trigger(reason)
        if self._incidents.is_due:
            self.snapshot(position)
        elif not self._is_state_checked:
            self._check_state()
        return None

    def _check_state(self) -> None:
        """Raises an error in the first step for optimizer state that no snapshot could hold."""
        state = [*self.optimizer.state.values()]
        if state and not self._has_nothing_to_copy():
            self._storage.check(state, "optimizer.state")
            self._is_state_checked = True

    def snapshot(self, position: Any = None) -> None:
        """Saves the current state, and drops the oldest snapshot beyond `keep`.

        Does nothing before the first forward pass of lazy modules, or under `FakeTensorMode`, since
        there are no values to save.

        Args:
            position: The current data position; see `step`. Default: None.
        """
        if self._has_nothing_to_copy():
            return
        self._first = None
        now = self._incidents.now(self.optimizer.steps_taken)
        is_saved = self._storage.take(self.objects, now, position)
        self._incidents.restart_count()
        if not is_saved:
            return
        self._incidents.forget_until(oldest=min(self._storage.moments(), default=now))
        if now.step > self._problem_until:
            self.attempts = 0

    def _has_nothing_to_copy(self) -> bool:
        """Whether some parameters or buffers have no values, because they are lazy or fake."""
        tensors = chain.from_iterable(map(tensors_of, self.objects.values()))
        return any(is_lazy(t) or not has_numbers(t) for t in tensors)

    def _take_first(self) -> None:
        if self._first is not None:
            self.snapshot(*self._first)

    def trigger(self, reason: str = "the caller asked for it") -> Rewind:
        """Rolls back now.

        Args:
            reason: The reason, for the log and for `Rewind.reason`.

        Returns:
            Where the training loop should continue.

        Raises:
            TrainingDivergedError: See `step`.
        """
        self.optimizer.settle()
        known = self._positions[-1][0] if self._positions else 0  # steps covered by `step`
        while self._inbox and self._inbox[0].step <= known:
            self._learn()
        self.attempts += 1
        now = self.optimizer.steps_taken
        story = f"at step {now}, {reason}"
        if self.attempts > self.max_attempts:
            raise TrainingDivergedError(
                f"{story}; {plural(self.max_attempts, 'rollback')} did not solve the problem. "
                f"{self._incidents}",
                self._incidents.culprits,
            )
        try:
            scaled = [*self.objects.values(), self.optimizer.scaler_in_use]
            with _same_tensors(self.optimizer), keep_lower_scales(scaled):
                taken = self._storage.restore(self.objects)
        except NothingToRestore as error:
            raise TrainingDivergedError(
                f"{story}, and {error}. Start again from an older checkpoint",
                self._incidents.culprits,
            ) from error
        self._incidents.rolled_back()
        if self.lr is not None and self.lr_factor < 1:
            # The restored schedule already includes the rollbacks before its snapshot.
            times = self._incidents.rollbacks - taken.moment.rollbacks
            self.lr.lower(self.lr_factor**times)
        self.optimizer.zero_grad()
        self._problem_until = max(self._problem_until, now)
        self._positions.clear()
        self._inbox.clear()
        skip = self._incidents.positions_since(taken.moment)
        step = taken.moment.step
        if self.lr is not None:  # restoring and lowering both change the factor
            story += f"; the schedule is now multiplied by {self.lr._factor:g}"
        log.warning("rolled back to step %d (attempt %d): %s", step, self.attempts, story)
        return Rewind(step, taken.position, skip, reason, self.attempts)

    def _learn_all(self) -> str | None:
        reason = None
        while self._inbox:
            reason = self._learn() or reason
        return reason

    def _learn(self) -> str | None:
        """Processes the next record, with the position of the first `step` call after its step."""
        record = self._inbox.popleft()
        while self._positions and self._positions[0][0] < record.step:
            self._positions.popleft()
        return self._incidents.learn(record, self._positions[0][1] if self._positions else None)

    def _forget_steps_before_load(self) -> None:
        """Discards earlier steps after a load, since they did not lead to the current state."""
        self._positions.clear()
        self._inbox.clear()
        self._incidents.state_was_loaded()


@contextmanager
def _same_tensors(optimizer: GuardedOptimizer) -> Iterator[None]:
    """Keeps the tensors in param groups and copies loaded values into them.

    Loading an optimizer state replaces these tensors, but a compiled or captured step would
    continue to use the old tensors.
    """
    before = [{k: v for k, v in g.items() if isinstance(v, Tensor)} for g in optimizer.param_groups]
    yield
    with torch.no_grad():
        for group, tensors in zip(optimizer.param_groups, before, strict=True):
            for name, tensor in tensors.items():
                if isinstance(group.get(name), Tensor):
                    group[name] = tensor.copy_(group[name])


def _resumed(optimizer: GuardedOptimizer, store: CheckpointStore | None) -> bool:
    """Whether the optimizer has just loaded the last clean checkpoint of the store.

    In that case, no first snapshot is needed.
    """
    newest = None if store is None else store.last_clean()
    return newest is not None and 0 < newest.step == optimizer.steps_taken
