"""Supports the optimizer functions of torch.distributed.checkpoint.

`get_optimizer_state_dict` and `set_optimizer_state_dict` need the following:

- They make an optimizer without state take a step with zero gradients and learning rates, so that
  the state is created. The guard passes this step directly to the wrapped optimizer.
- They keep only `state` and `param_groups` of a state dict, so the guard's state is stored in the
  first param group.
- They create no state for an optimizer whose parameters have gradients. With flat buckets every
  parameter always has a gradient, so gradients that are all zero are detached first.
- They read a flattened state dict by the keys of the current param groups, so the first param group
  needs an entry for the guard's state during loading.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from fastguard.functional.flat_buckets import FlatGradBuckets

KEY = "fastguard"
_MODULE = "torch.distributed.checkpoint.state_dict"
_FIRST_READER = "_init_optim_state"
_FRAMES = 12  # maximum number of frames to search; torch, schedulers and trainers add wrappers


def is_calling() -> bool:
    """Whether torch.distributed.checkpoint is the caller.

    Only the call stack distinguishes a step of torch.distributed.checkpoint from a user's step,
    such as a warm-up step with learning rate 0 on a batch without gradients.
    """
    if _MODULE not in sys.modules:
        return False
    frame = sys._getframe(1).f_back
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False


def only_creates_state(optimizer: Optimizer) -> bool:
    """Whether this is the step with which torch.distributed.checkpoint creates the state."""
    return not optimizer.state and is_calling()


def embed(state_dict: dict[str, Any], optimizer: Optimizer) -> None:
    """Stores the guard's state where torch.distributed.checkpoint finds it.

    Args:
        state_dict: The state dict of the guarded optimizer; changed in place.
        optimizer: The wrapped optimizer; the entry that `make_room` has added is removed.
    """
    groups = state_dict.get("param_groups")
    if groups:
        groups[0][KEY] = state_dict[KEY]
        optimizer.param_groups[0].pop(KEY, None)


def make_room(optimizer: Optimizer, flat: FlatGradBuckets | None) -> None:
    """Prepares an optimizer if torch.distributed.checkpoint is reading its state.

    Called by the property `state`, which torch.distributed.checkpoint reads before it loads a state
    dict or creates state. Does nothing for other callers. If a flattened state dict with the
    guard's state is being loaded, adds an entry for that state to the first param group; otherwise
    torch would raise an error for the missing key. If there is no state yet, flat gradients that
    are all zero are detached, which waits for a GPU.

    Args:
        optimizer: The wrapped optimizer.
        flat: The flat gradients of the optimizer, or None.
    """
    reader = sys._getframe(2)
    if reader.f_globals.get("__name__") != _MODULE or reader.f_code.co_name != _FIRST_READER:
        return
    if flat is not None and not optimizer.state and not any(b.flat.any() for b in flat.buffers):
        flat.detach()
    loader = reader.f_back
    flattened = None if loader is None else loader.f_locals.get("state_dict")
    if isinstance(flattened, Mapping) and any(map(_is_of_guard, flattened)):
        optimizer.param_groups[0].setdefault(KEY, None)


def _is_of_guard(key: object) -> bool:
    return isinstance(key, str) and key.startswith("param_groups.") and key.endswith(f".{KEY}")


def split(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Splits off the guard's state (or None), which may be at the top level or in a param group.

    The argument is not changed.

    Returns:
        The state dict of the wrapped optimizer, and the guard's state.
    """
    guard = state_dict.get(KEY)
    inner = {k: v for k, v in state_dict.items() if k != KEY}
    groups = inner.get("param_groups")
    if isinstance(groups, list | tuple) and all(isinstance(g, Mapping) for g in groups):
        groups = [dict(group) for group in groups]
        embedded = [group.pop(KEY, None) for group in groups]
        inner["param_groups"] = groups
        if guard is None:
            guard = next((e for e in embedded if e is not None), None)
    return inner, guard
