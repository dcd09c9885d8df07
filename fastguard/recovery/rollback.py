"""`Rollback`: when skipping is not enough, go back to the last good state, within the process.

Every `every` applied clean steps the state of model, optimizer and whatever else has a `state_dict`
is kept, in host memory or in a `CheckpointStore`. When too many steps in a row are skipped, or
spike, or the caller says so, the newest state that is finite throughout is loaded again, the
learning rate is lowered, and the caller is told where to go on and which data to leave out. After
`max_attempts` without getting past the trouble it gives up with the story.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastguard.checkpoints import CheckpointStore
from fastguard.errors import TrainingDivergedError
from fastguard.errors.checked_numbers import count_of, number_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.guard.grad_scaler import lower_scales_stay
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.guard.weak_hooks import hook_weakly
from fastguard.ranks.lockstep import Peers
from fastguard.recovery.guarded_lr import GuardedLR
from fastguard.recovery.incident_log import BadStretch
from fastguard.recovery.snapshot_stores import (
    POSITION,
    InMemory,
    InStore,
    NothingToRestore,
    Place,
    group_sizes,
)

log = logging.getLogger("fastguard")


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a rollback asks of the training loop.

    Attributes:
        step: The optimizer step whose state is in force again.
        position: Where the data stood then: what `Rollback.step` was given at that step.
        skip: The positions of the bad steps since then, in order: data to leave out.
        reason: What set it off.
        attempt: How many rollbacks this trouble has taken, from 1.
    """

    step: int
    position: Any
    skip: tuple[Any, ...]
    reason: str
    attempt: int


class Rollback:
    """Takes snapshots and goes back to them.

    On several ranks, every rank constructs it and calls its methods at the same steps; all ranks go
    back to the same snapshot, or none does. Tensor learning rates stay the tensors they are. The
    scale of a `GradScaler` never grows by a rollback: a larger one would only overflow again.

    After a param group was added, the next good step is kept, since no earlier state can be loaded.

    A state that the caller loads into the optimizer begins anew: steps before it no longer count,
    and the next good step is kept. Until then an earlier snapshot is what there is; call `snapshot`
    once everything is loaded, and there is a better one.

    On a road without synchronisation (fused optimizers on a GPU) it acts on the verdict of step k
    at step k + 1, but a step that may be kept waits for its own.

    Args:
        optimizer: The guarded optimizer; it is part of every snapshot.
        objects: Everything else that makes up the run, by name: model, scheduler, GradScaler, EMA,
            data loader; anything with `state_dict` and `load_state_dict`. Random number generators
            are always included.
        every: Applied steps between snapshots. A snapshot waits for a step without an incident, up
            to as many steps again; then one that was applied all the same (cleaned, or with a spike
            that nothing acts on) may be kept.
        keep: How many snapshots are kept in host memory; a `store` keeps as many as it was told.
        after_skips: Skipped steps in a row that set off a rollback; None: they do not. A step that
            is skipped only to lower a loss scale is not one of them.
        after_spikes: Steps in a row with a spike (recorded, clipped or skipped) that do; None: not.
        lr: The schedule to lower at a rollback.
        lr_factor: What it is lowered by.
        max_attempts: Rollbacks without a snapshot beyond the trouble before giving up.
        store: Where snapshots are kept instead of in host memory: slower, but a process that is
            started again can load them (`store.load("last-clean", ...)`, where the names are those
            of `objects`, `optimizer`, `lr`, and the data position is `position`). Give it a
            directory of its own. A disk that fails is logged, and the run goes on.
        position: Where the data stands now, for the snapshot that is taken at once; as in `step`.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

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
        if not isinstance(optimizer, GuardedOptimizer):
            raise TypeError(f"optimizer={shown(optimizer)} must be a fastguard.GuardedOptimizer")
        _check_counts(every=every, keep=keep, max_attempts=max_attempts)
        optional = {"after_skips": after_skips, "after_spikes": after_spikes}
        _check_counts(**{name: value for name, value in optional.items() if value is not None})
        if not 0 < number_of("lr_factor", lr_factor, "use a number in (0, 1]") <= 1:
            raise ValueError(f"lr_factor={lr_factor!r} must be a number in (0, 1]")
        if store is not None and not isinstance(store, CheckpointStore):
            raise TypeError(f"store={shown(store)} must be None or a fastguard.CheckpointStore")
        if lr is not None and not isinstance(lr, GuardedLR):
            raise TypeError(
                f"lr is a {type(lr).__name__}, which cannot be lowered; pass GuardedLR(schedule), "
                "or have the schedule among the objects"
            )
        _check_reachable(after_skips, optimizer.max_consecutive_skips)
        self.optimizer = optimizer
        self.objects = _with_own(objects, optimizer, lr)
        for name, thing in self.objects.items():
            _check_memory(name, thing)
        self.lr, self.lr_factor = lr, lr_factor
        self.max_attempts = max_attempts
        self.attempts = 0
        self._trouble_until = 0
        self._inbox = optimizer.subscribe()
        self._positions: deque[tuple[int, Any]] = deque()  # each with the steps taken until then
        self._stretch = BadStretch(every, after_skips, after_spikes)
        hook_weakly(optimizer.register_load_state_dict_post_hook, self._go_on_from_loaded_state)
        self._sizes = group_sizes(optimizer)
        self._place: Place
        if store is None:
            self._place = InMemory(optimizer, keep, Peers(optimizer.process_group))
        else:
            self._place = InStore(store)
        self._first: tuple[Any] | None = None  # the position, while there is nothing to copy
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
        return self._stretch.every

    @property
    def rollbacks(self) -> int:
        """Rollbacks in the life of this object; `attempts` counts those of the present trouble."""
        return self._stretch.rollbacks

    @property
    def snapshots(self) -> list[int]:
        """The steps of the snapshots at hand, oldest first."""
        return [moment.step for moment in self._place.moments()]

    def step(self, position: Any = None) -> Rewind | None:
        """To be called after every `optimizer.step`; a call after several stands for them all.

        Waits for the verdict of the step if a snapshot depends on it.

        Args:
            position: Where the data stands: whatever finds this batch again. With a `store`,
                something that a checkpoint can hold: numbers, strings, and containers of them.

        Returns:
            None, or what to do after a rollback.

        Raises:
            TrainingDivergedError: `max_attempts` rollbacks did not get past the trouble, or no
                snapshot is finite.
        """
        if self._sizes != (sizes := group_sizes(self.optimizer)):
            self._sizes = sizes  # parameters have joined: earlier snapshots can no longer be loaded
            self._stretch.keep_next()
        self._positions.append((self.optimizer.steps_taken, position))
        reason = self._learn_all()
        if reason is None and self._stretch.is_due_after(1):
            # Alone: when others learn of this step must not depend on our snapshots.
            self._inbox.settle()
            reason = self._learn_all()
        if reason is not None:
            return self.trigger(reason)
        if self._stretch.is_due:
            self.snapshot(position)
        return None

    def snapshot(self, position: Any = None) -> None:
        """Keeps the state of now; the oldest snapshot beyond `keep` is overwritten.

        Nothing is kept while the model has lazy modules before their first forward pass, nor under
        `FakeTensorMode`: there is no state to go back to.
        """
        if self._has_nothing_to_copy():
            return
        self._first = None
        now = self._stretch.now(self.optimizer.steps_taken)
        kept = self._place.take(self.objects, now, position)
        self._stretch.begin_anew()
        if not kept:
            return
        self._stretch.taken(oldest=min(self._place.moments(), default=now))
        if now.step > self._trouble_until:
            self.attempts = 0

    def _has_nothing_to_copy(self) -> bool:
        """Whether parameters or buffers are lazy, or placeholders."""
        tensors = chain.from_iterable(map(_tensors_of, self.objects.values()))
        return any(is_lazy(t) or not has_numbers(t) for t in tensors)

    def _take_first(self) -> None:
        if self._first is not None:
            self.snapshot(*self._first)

    def trigger(self, reason: str = "the caller asked for it") -> Rewind:
        """Goes back now.

        Raises:
            TrainingDivergedError: As in `step`.
        """
        self.optimizer.settle()
        told = self._positions[-1][0] if self._positions else 0
        while self._inbox and self._inbox[0].step <= told:
            self._learn()
        self.attempts += 1
        now = self.optimizer.steps_taken
        story = f"{reason}, at step {now}"
        if self.attempts > self.max_attempts:
            raise TrainingDivergedError(
                f"{story}; {self.max_attempts} rollbacks did not get past it. {self._stretch}",
                self._stretch.culprits,
            )
        try:
            with _same_tensors(self.optimizer), lower_scales_stay(self.objects.values()):
                taken = self._place.restore(self.objects)
        except NothingToRestore as error:
            raise TrainingDivergedError(
                f"{story}, and {error}. Start again from an older checkpoint",
                self._stretch.culprits,
            ) from error
        self._stretch.go_back()
        if self.lr is not None and self.lr_factor < 1:
            # The restored schedule remembers what the rollbacks before its snapshot did to it.
            times = self._stretch.rollbacks - taken.moment.rollbacks
            self.lr.lower(self.lr_factor**times)
        self.optimizer.zero_grad()
        self._trouble_until = max(self._trouble_until, now)
        self._positions.clear()
        self._inbox.clear()
        skip = self._stretch.positions_since(taken.moment)
        step = taken.moment.step
        log.warning("rolled back to step %d (attempt %d): %s", step, self.attempts, story)
        return Rewind(step, taken.position, skip, reason, self.attempts)

    def _learn_all(self) -> str | None:
        reason = None
        while self._inbox:
            reason = self._learn() or reason
        return reason

    def _learn(self) -> str | None:
        """Takes the next record, with the position that `step` was given first after its step."""
        record = self._inbox.popleft()
        while self._positions and self._positions[0][0] < record.step:
            self._positions.popleft()
        return self._stretch.learn(record, self._positions[0][1] if self._positions else None)

    def _go_on_from_loaded_state(self) -> None:
        """The steps before a load are not those that led to the state in force."""
        self._positions.clear()
        self._inbox.clear()
        self._stretch.go_on_from_another_state()


def _check_counts(**counts: object) -> None:
    for name, value in counts.items():
        count_of(name, value, 1)


def _check_reachable(after_skips: int | None, limit: int | None) -> None:
    """The optimizer ends the run at `limit + 1` skips in a row, before anybody can go back."""
    if after_skips is not None and limit is not None and after_skips > limit:
        raise ValueError(
            f"after_skips={after_skips} never comes: the optimizer ends the run after more than "
            f"max_consecutive_skips={limit} skips in a row; use after_skips <= {limit}, or None"
        )


def _tensors_of(thing: Any) -> Iterable[Tensor]:
    """The parameters of a model or optimizer, with the buffers of a model."""
    if isinstance(thing, torch.nn.Module):
        return chain(thing.parameters(), thing.buffers())
    if isinstance(thing, torch.optim.Optimizer):
        return (p for group in thing.param_groups for p in group["params"])
    return ()


def _check_memory(name: str, thing: Any) -> None:
    """Raises a ValueError for a model or optimizer on the meta device."""
    if any(t.is_meta for t in _tensors_of(thing)):
        raise ValueError(
            f"objects[{name!r}] has parameters on the meta device, which holds no numbers to go "
            "back to; give the model its memory first: model.to_empty(device=...), its weights, "
            "then the optimizer"
        )


def _with_own(
    objects: Mapping[str, Any], optimizer: GuardedOptimizer, lr: GuardedLR | None
) -> dict[str, Any]:
    """The objects of the user and those that every snapshot holds."""
    if not isinstance(objects, Mapping):
        raise TypeError(
            f"objects is a {type(objects).__name__}; pass a dict by name, such as "
            "{'model': model}"
        )
    own: dict[str, Any] = {"optimizer": optimizer}
    if lr is not None:
        own["lr"] = lr
    for name, thing in objects.items():
        if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise TypeError(
                f"objects[{name!r}] is a {type(thing).__name__} without state_dict and "
                "load_state_dict; wrap it in an object that has both"
            )
        if name == POSITION or own.get(name, thing) is not thing:
            raise ValueError(
                f"objects[{name!r}]: Rollback itself keeps something under that name; choose "
                "another one"
            )
    return {**objects, **own}


@contextmanager
def _same_tensors(optimizer: GuardedOptimizer) -> Iterator[None]:
    """What param groups hold as tensors gets its new values in place, also on a GPU.

    Loading an optimizer puts new ones there; a compiled or captured step would go on with the old.
    """
    before = [{k: v for k, v in g.items() if isinstance(v, Tensor)} for g in optimizer.param_groups]
    yield
    with torch.no_grad():
        for group, tensors in zip(optimizer.param_groups, before, strict=True):
            for name, tensor in tensors.items():
                if isinstance(group.get(name), Tensor):
                    group[name] = tensor.copy_(group[name])


def _resumed(optimizer: GuardedOptimizer, store: CheckpointStore | None) -> bool:
    """Whether the optimizer stands where the last clean checkpoint left it: just loaded."""
    newest = None if store is None else store.last_clean()
    return newest is not None and 0 < newest.step == optimizer.steps_taken
