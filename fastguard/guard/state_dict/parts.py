"""What the state dict of a guarded optimizer consists of: that of the wrapped one, and the guard's.

An optimizer with torch's own `state_dict` has `state` and `param_groups`. One with a method of its
own (a Lookahead around another optimizer, a container of several) may save anything: its entries
stand beside the guard's as they are, and what is no dict stands under `"wrapped"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from fastguard.guard.state_dict.torch_dcp import KEY, is_calling, split

WRAPPED = "wrapped"


def saves_as_torch(optimizer: Optimizer) -> bool:
    """Whether the state dict of an optimizer is what torch's own method makes of it."""
    return getattr(optimizer.state_dict, "__func__", None) is Optimizer.state_dict


def joined(wrapped: Any, guard: dict[str, Any]) -> dict[str, Any]:
    """The state dict of a guarded optimizer.

    Args:
        wrapped: That of the wrapped optimizer.
        guard: The state of the guard.
    """
    if not isinstance(wrapped, Mapping) or KEY in wrapped or WRAPPED in wrapped:
        return {WRAPPED: wrapped, KEY: guard}
    return {**split(wrapped)[0], KEY: guard}


def parts(state_dict: Mapping[str, Any], optimizer: Optimizer) -> tuple[Any, Any]:
    """The state dict of the wrapped optimizer, and that of the guard, None without one.

    The given one is not changed.

    Raises:
        ValueError: It is no state dict of such an optimizer.
    """
    if WRAPPED in state_dict and KEY in state_dict:
        return state_dict[WRAPPED], state_dict[KEY]
    if set(state_dict) == {"param_groups"} and not optimizer.state and is_calling():
        state_dict = {"state": {}, **state_dict}  # torch.distributed.checkpoint drops empty ones
    if saves_as_torch(optimizer):
        _check_torch_parts(state_dict)
    return split(state_dict)


def opened(state_dict: object) -> dict[str, Any]:
    """A shallow copy, for hooks to change.

    Raises:
        TypeError: It is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"the state dict is a {type(state_dict).__name__}; pass what opt.state_dict() returned"
        )
    return dict(state_dict)


def _check_torch_parts(state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError for what is no state dict of an optimizer."""
    remedy = "pass what opt.state_dict() returned"
    missing = [repr(key) for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"the state dict lacks {' and '.join(missing)}; {remedy}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict['state'] is a {type(state).__name__}; {remedy}")
    if not isinstance(groups, list | tuple):
        raise ValueError(f"state_dict['param_groups'] is a {type(groups).__name__}; {remedy}")
    for i, group in enumerate(groups):
        where = f"state_dict['param_groups'][{i}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} is a {type(group).__name__}; {remedy}")
        if "params" not in group:
            raise ValueError(f"{where} lacks 'params'; {remedy}")
