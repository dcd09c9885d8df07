"""Combines and splits the two parts of a state dict: the wrapped optimizer's and the guard's.

With torch's `state_dict`, an optimizer saves `state` and `param_groups`. An optimizer with its own
method (a Lookahead, a container of several optimizers) may save anything: a dict is merged with the
guard's entry, and any other value is saved as `"wrapped"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from fastguard.guard.state_dict.torch_dcp import KEY, is_calling, split

WRAPPED = "wrapped"


def saves_as_torch(optimizer: Optimizer) -> bool:
    """Whether an optimizer uses torch's `state_dict` method."""
    return getattr(optimizer.state_dict, "__func__", None) is Optimizer.state_dict


def joined(wrapped: Any, guard: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict of a guarded optimizer.

    Args:
        wrapped: The state dict of the wrapped optimizer.
        guard: The state of the guard.
    """
    if not isinstance(wrapped, Mapping) or KEY in wrapped or WRAPPED in wrapped:
        return {WRAPPED: wrapped, KEY: guard}
    return {**split(wrapped)[0], KEY: guard}


def parts(state_dict: Mapping[str, Any], optimizer: Optimizer) -> tuple[Any, Any]:
    """Splits a state dict into the parts of the wrapped optimizer and of the guard (or None).

    The argument is not changed.

    Raises:
        ValueError: The argument is not a state dict of such an optimizer.
    """
    if WRAPPED in state_dict and KEY in state_dict:
        return state_dict[WRAPPED], state_dict[KEY]
    if set(state_dict) == {"param_groups"} and not optimizer.state and is_calling():
        state_dict = {"state": {}, **state_dict}  # torch.distributed.checkpoint drops empty dicts
    if saves_as_torch(optimizer):
        _check_torch_parts(state_dict)
    return split(state_dict)


def opened(state_dict: object) -> dict[str, Any]:
    """Returns a shallow copy, which hooks may change.

    Raises:
        TypeError: The argument is not a mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"the state dict is a {type(state_dict).__name__}; pass the result of opt.state_dict()"
        )
    return dict(state_dict)


def _check_torch_parts(state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError if the argument is not a state dict in torch's format."""
    remedy = "pass the result of opt.state_dict()"
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
