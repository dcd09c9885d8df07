"""Being saved and loaded by `get_` and `set_optimizer_state_dict` of torch.distributed.checkpoint.

They let an optimizer without state take one step, all gradients and learning rates zero, so that it
creates its state: that step goes to the wrapped optimizer and is not the guard's. And they keep
`state` and `param_groups` of a state dict and nothing else, so the guard's state travels in the
first param group.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

KEY = "fastguard"
_MODULE = "torch.distributed.checkpoint.state_dict"
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


def embed(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Puts the guard's state where torch.distributed.checkpoint finds it.

    Args:
        state_dict: Of the guarded optimizer.
        param_groups: The live ones: a flattened state dict (`flatten_optimizer_state_dict`) is read
            back by the keys that they hold then.
    """
    state_dict["param_groups"][0][KEY] = state_dict[KEY]
    param_groups[0].setdefault(KEY, None)


def split(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The state dict of the wrapped optimizer, and that of the guard, wherever it was; else None.

    The given one is not changed.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    embedded = [group.pop(KEY, None) for group in groups]
    inner = {k: v for k, v in state_dict.items() if k != KEY}
    guard = state_dict.get(KEY)
    if guard is None:
        guard = next((e for e in embedded if e is not None), None)
    return {**inner, "param_groups": groups}, guard
