"""Validates the arguments of `Rollback`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastguard.checkpoints import CheckpointStore
from fastguard.errors.checked_numbers import count_of, number_of
from fastguard.errors.plain_text import shown
from fastguard.guard.guarded import GuardedOptimizer
from fastguard.recovery.guarded_lr import GuardedLR
from fastguard.recovery.snapshot_stores import POSITION


def check_arguments(
    optimizer: object,
    lr: object,
    lr_factor: object,
    store: object,
    after_skips: int | None,
    after_spikes: int | None,
    **counts: int,
) -> None:
    """Raises a TypeError or ValueError for invalid arguments of `Rollback`.

    Args:
        optimizer, lr, lr_factor, store, after_skips, after_spikes: The arguments.
        counts: All other arguments, which must be integers >= 1.
    """
    if not isinstance(optimizer, GuardedOptimizer):
        raise TypeError(f"optimizer={shown(optimizer)} must be a fastguard.GuardedOptimizer")
    optional = {"after_skips": after_skips, "after_spikes": after_spikes}
    for name, value in (counts | {k: v for k, v in optional.items() if v is not None}).items():
        count_of(name, value, 1)
    if not 0 < number_of("lr_factor", lr_factor, "use a number in (0, 1]") <= 1:
        raise ValueError(f"lr_factor={lr_factor!r} must be a number in (0, 1]")
    if store is not None and not isinstance(store, CheckpointStore):
        raise TypeError(f"store={shown(store)} must be None or a fastguard.CheckpointStore")
    if lr is not None and not isinstance(lr, GuardedLR):
        raise TypeError(
            f"lr is a {type(lr).__name__}, which cannot be lowered; pass GuardedLR(schedule), "
            "or add the schedule to the objects"
        )
    limit = optimizer.max_consecutive_skips
    if after_skips is not None and limit is not None and after_skips > limit:
        raise ValueError(
            f"after_skips={after_skips} is never reached, because the optimizer ends the run after "
            f"more than max_consecutive_skips={limit} skips in a row; use after_skips <= {limit}, "
            "or None"
        )


def tensors_of(thing: Any) -> Iterable[Tensor]:
    """Yields the parameters of a model or optimizer, and the buffers of a model."""
    if isinstance(thing, torch.nn.Module):
        return chain(thing.parameters(), thing.buffers())
    if isinstance(thing, torch.optim.Optimizer):
        return (p for group in thing.param_groups for p in group["params"])
    return ()


def with_own(
    objects: Mapping[str, Any], optimizer: GuardedOptimizer, lr: GuardedLR | None
) -> dict[str, Any]:
    """Returns the user's objects and the objects that every snapshot includes.

    Raises:
        TypeError, ValueError: An object has no state, no values, or a reserved name.
    """
    if not isinstance(objects, Mapping):
        raise TypeError(
            f"objects is a {type(objects).__name__}, expected a dict of objects by name, such as "
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
                f"objects[{name!r}] has a name that Rollback uses itself; choose another name"
            )
    every = {**objects, **own}
    for name, thing in every.items():
        _check_memory(name, thing)
    return every


def _check_memory(name: str, thing: Any) -> None:
    """Raises a ValueError for a model or optimizer on the meta device."""
    if any(t.is_meta for t in tensors_of(thing)):
        raise ValueError(
            f"objects[{name!r}] has parameters on the meta device, which have no values to save; "
            "allocate the model with model.to_empty(device=...), load its weights, then create "
            "the optimizer"
        )
