"""Being saved and loaded by `get_` and `set_optimizer_state_dict` of torch.distributed.checkpoint.

They let an optimizer without state take one step, all gradients and learning rates zero, so that it
creates its state: that step goes to the wrapped optimizer and is not the guard's. And they keep
`state` and `param_groups` of a state dict and nothing else, so the guard's state travels in the
first param group. A flattened state dict they read back by the keys of the live param groups, so
the first of these has a place for it while they do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

KEY = "fastguard"
_MODULE = "torch.distributed.checkpoint.state_dict"
_FIRST_READER = "_init_optim_state"
_FRAMES = 12  # between it and a step: torch's own wrappers, a scheduler's, a trainer's


def is_calling() -> bool:
    """Whether torch.distributed.checkpoint is the caller.

    Nothing but the stack tells its step from a user's: a warm-up from a learning rate of 0 on a
    batch without gradients looks the same.
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
    """Whether the step that is being taken is that of torch.distributed.checkpoint."""
    return not optimizer.state and is_calling()


def embed(state_dict: dict[str, Any], optimizer: Optimizer) -> None:
    """Puts the guard's state where torch.distributed.checkpoint finds it.

    Args:
        state_dict: Of the guarded optimizer.
        optimizer: The wrapped one; a place that `make_room` made in its param groups goes again.
    """
    groups = state_dict.get("param_groups")
    if groups:
        groups[0][KEY] = state_dict[KEY]
        optimizer.param_groups[0].pop(KEY, None)


def make_room(optimizer: Optimizer) -> None:
    """Called by the property that gives out `optimizer.state`, the first thing that
    torch.distributed.checkpoint asks for when it loads: the live param groups get an entry for the
    guard's state if a flattened state dict brings one. For one without, that entry would be missed.
    """
    reader = sys._getframe(2)
    if reader.f_globals.get("__name__") != _MODULE or reader.f_code.co_name != _FIRST_READER:
        return
    loader = reader.f_back
    flattened = None if loader is None else loader.f_locals.get("state_dict")
    if isinstance(flattened, Mapping) and any(map(_is_of_guard, flattened)):
        optimizer.param_groups[0].setdefault(KEY, None)


def _is_of_guard(key: object) -> bool:
    return isinstance(key, str) and key.startswith("param_groups.") and key.endswith(f".{KEY}")


def split(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The state dict of the wrapped optimizer, and that of the guard, wherever it was; else None.

    The given one is not changed.
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
