"""Loads state entries that `Optimizer.load_state_dict` cannot load.

torch rebuilds each iterable as `type(value)(items)`. This call fails for named tuples, NumPy arrays
and storages, turns a string into the repr of a generator, and drops the `maxlen` of a deque. torch
also casts each tensor to the parameter's dtype, which fails for quantized tensors and float4. This
module hides such entries in an object while torch loads all other entries.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

REBUILT = (dict, list, tuple, set, frozenset, bytes, torch.Size)
"""Types that torch rebuilds correctly, as it does subclasses with the same constructor."""


class _Hidden:
    """Wraps an entry in an object that torch keeps, since it is neither a tensor nor iterable."""

    def __init__(self, value: Any) -> None:
        self.value = value


def hide(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict in which uncastable entries are hidden and all other entries are shared.

    Args:
        state_dict: The state dict to load, in torch's format; not changed.
    """
    if not isinstance(state_dict.get("state"), dict):
        return state_dict
    state = {i: _hidden(of_p) for i, of_p in state_dict["state"].items()}
    return {**state_dict, "state": state}


def reveal(optimizer: Optimizer) -> None:
    """Replaces hidden entries of a loaded state with copies on the parameter's device."""
    for p, of_p in optimizer.state.items():
        optimizer.state[p] = _revealed(of_p, p.device if isinstance(p, Tensor) else None)


def _hidden(value: Any) -> Any:
    if type(value) is dict:
        return {key: _hidden(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_hidden, value))
    return value if _is_castable(value) else _Hidden(value)


def _is_castable(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_quantized and value.dtype is not torch.float4_e2m1fn_x2
    if not isinstance(value, Iterable):
        return True
    return isinstance(value, REBUILT) and not hasattr(value, "_fields")


def _revealed(value: Any, device: torch.device | None) -> Any:
    if type(value) is dict:
        return {key: _revealed(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_revealed(item, device) for item in value)
    return _copied(value.value, device) if isinstance(value, _Hidden) else value


def _copied(value: Any, device: torch.device | None) -> Any:
    """Returns a copy of an entry, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if isinstance(value, deque):
        return deque((_copied(item, device) for item in value), value.maxlen)
    if isinstance(value, tuple):
        return type(value)(*(_copied(item, device) for item in value))
    return copy.deepcopy(value)
