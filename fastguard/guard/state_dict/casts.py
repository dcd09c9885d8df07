"""Restores the saved dtypes of state tensors after torch has cast them to the parameter's dtype.

An optimizer may keep float32 or integer tensors for 16-bit weights; when loading, torch casts all
of them except `step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastguard.optim.optimizer import FusedOptimizer


def take_back_casts(
    optimizer: Optimizer, saved: Mapping[str, Any], live: Mapping[Any, Any]
) -> None:
    """Replaces loaded tensors that torch has cast with the saved tensors.

    If there was state before loading, its dtype takes precedence. Otherwise the saved dtype is
    kept, with one exception: for optimizers of torch, state with the shape of the parameter takes
    the parameter's dtype, so that a state of float32 training can be loaded into 16-bit parameters.

    Args:
        optimizer: The optimizer after loading; changed in place.
        saved: The state dict that was loaded.
        live: The state before loading.
    """
    # these optimizers handle the dtypes of their state themselves
    if isinstance(optimizer, FusedOptimizer):
        return
    scalars, of_torch = scalar_entries(optimizer), is_of_torch(optimizer)
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for i, p in zip(ids, parameters_of(optimizer), strict=False):
        own, before = saved["state"].get(i), live.get(p, {})
        if not isinstance(own, Mapping):
            continue
        for key, value in optimizer.state.get(p, {}).items():
            own_dtype = isinstance(value, Tensor) and (key in before or key in scalars)
            if own_dtype or not of_torch:
                restored = _as_saved(key, value, own.get(key), before.get(key))
                optimizer.state[p][key] = restored


def _as_saved(key: object, loaded: Any, saved: Any, live: Any) -> Any:
    """Returns a loaded entry with the dtypes of the saved one."""
    if key == "step":  # torch has a separate rule for the dtype and device of `step`
        return loaded
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        if saved.dtype == loaded.dtype:
            return loaded
        if isinstance(live, Tensor) and live.dtype != saved.dtype:
            return loaded
        return saved.to(loaded.device, copy=True)
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        was = live if isinstance(live, Mapping) else {}
        return {k: _as_saved(k, v, saved.get(k), was.get(k)) for k, v in loaded.items()}
    if type(loaded) in (list, tuple) and isinstance(saved, list | tuple):
        pairs = zip(loaded, saved, strict=True)
        return type(loaded)(_as_saved(None, v, s, None) for v, s in pairs)
    return loaded


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Returns the parameters of an optimizer, group after group."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def scalar_entries(optimizer: Optimizer) -> set[str]:
    """Returns the names of the state entries that are a single number for every parameter."""
    states = [s for s in optimizer.state.values() if isinstance(s, Mapping)]
    tensors = [(k, v.dim()) for s in states for k, v in s.items() if isinstance(v, Tensor)]
    return {k for k, dim in tensors if dim == 0} - {k for k, dim in tensors if dim > 0}


def is_of_torch(optimizer: Optimizer) -> bool:
    """Whether an optimizer is defined in `torch.optim`."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")
