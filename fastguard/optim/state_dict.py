"""Loads state dicts saved by the fused optimizers or by torch's optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastguard.optim.options import state_dtype_of
from fastguard.optim.sort import MASTER_KEYS, STEP

if TYPE_CHECKING:
    from fastguard.optim.optimizer import FusedOptimizer


def transferable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict whose tensors the ranks can exchange.

    To gather a full state dict from shards, ranks send each other tensors. Neither gloo nor NCCL
    can send int16, so remainders are copied to int32 if there is a process group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return state_dict
    remainder = MASTER_KEYS["remainder"]
    state = {
        i: {k: v.to(torch.int32) if k == remainder else v for k, v in entries.items()}
        for i, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def check_modes(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Raises a ValueError for a state dict that was saved with a different `master`."""
    saved_groups = state_dict["param_groups"] if "param_groups" in state_dict else ()
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=False)):
        if "master" in saved and saved["master"] != group["master"]:
            raise ValueError(
                f"param group {g} of the state dict was saved with master={saved['master']!r}, "
                f"but this optimizer has master={group['master']!r}; construct the optimizer with "
                f"master={saved['master']!r}"
            )


def take_over(
    optimizer: FusedOptimizer, saved: Mapping[str, Any], before: Sequence[Mapping[str, Any]]
) -> None:
    """Replaces values that torch has cast while loading with the values in the state dict.

    Args:
        optimizer: The optimizer, after torch has loaded the state dict.
        saved: The state dict.
        before: The param groups before loading; settings that `saved` lacks keep their values.
    """
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for group, saved_group, old in zip(
        optimizer.param_groups, saved["param_groups"], before, strict=True
    ):
        for key in optimizer.own_settings:
            if key not in saved_group:
                group[key] = old[key]
        for p in group["params"]:
            entries = saved["state"].get(next(ids), {})
            _check_shapes(entries, p)
            kept = {k: _kept(k, v, group, p) for k, v in entries.items()}
            kept = {k: v for k, v in kept.items() if v is not None}
            if kept or p in optimizer.state:
                optimizer.state[p] = kept


def _check_shapes(entries: Mapping[str, Any], p: Tensor) -> None:
    """Raises a ValueError for state of the wrong shape; an update would write past its end."""
    for key, value in entries.items():
        expected = torch.Size() if key == STEP else p.shape
        if isinstance(value, Tensor) and value.shape != expected:
            raise ValueError(
                f"the state dict has {key!r} of shape {tuple(value.shape)} for a parameter of "
                f"shape {tuple(p.shape)}; load the state dict into an optimizer with the same "
                "parameters in the same order"
            )


def _kept(key: str, value: Any, group: Mapping[str, Any], p: Tensor) -> Any:
    """Returns a saved entry in this optimizer's dtype, or None if it must be reinitialized."""
    if not isinstance(value, Tensor):
        if key == STEP:  # old versions of torch saved a number
            return torch.tensor(float(value), device=p.device)
        return value
    if key == STEP:
        return value.to(device=p.device, dtype=torch.float32, copy=True)
    if key in MASTER_KEYS.values():
        # torch's optimizers cast a master when loading it, and never update it, so a cast master is
        # outdated.
        exact = (torch.int16, torch.int32) if key == "remainder" else (torch.float32,)
        if MASTER_KEYS.get(group["master"]) != key or value.dtype not in exact:
            return None
        return value.to(device=p.device, dtype=exact[0], copy=True)
    return value.to(device=p.device, dtype=state_dtype_of(group, p), copy=True)
