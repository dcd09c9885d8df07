"""Why a state that torch has loaded does not belong to the optimizer that it was loaded into.

torch takes what another optimizer saved, or the same one for another model, and fails at the next
step. Judged after loading: hooks of the optimizer may adapt a state dict, and torch adds the
settings that older releases did not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.state_dict.casts import is_of_torch, parameters_of, scalar_entries

# Entries without which a parameter's state is that of another optimizer with the same settings.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NEEDED: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: _MOMENTS,
    torch.optim.AdamW: _MOMENTS,
    torch.optim.NAdam: (*_MOMENTS, "mu_product"),
    torch.optim.RAdam: _MOMENTS,
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
}
# The dimension over which Adafactor keeps means alone.
_MEAN_OVER = {"row_var": -1, "col_var": -2}


def misfit(
    optimizer: Optimizer, live: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> str | None:
    """Why what is loaded does not belong to the optimizer.

    Args:
        optimizer: As it is after loading.
        live: Its state before.
        groups: Its param groups before; torch adds to `defaults` what no group of a custom
            optimizer holds.
    """
    name = type(optimizer).__name__
    for i, (group, own) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        missing = [key for key in optimizer.defaults if key in own and key not in group]
        if missing:
            return (
                f"param group {i} lacks {', '.join(missing)}: another optimizer saved this state "
                f"dict; load one that was saved from {name}"
            )
    scalars = scalar_entries(optimizer)
    for i, p in enumerate(parameters_of(optimizer)):
        state = optimizer.state.get(p, {})
        if not isinstance(state, Mapping):
            return (
                f"the state of parameter {i} is a {type(state).__name__}, not a dict; "
                "pass what opt.state_dict() returned"
            )
        missing = [key for key in _NEEDED.get(type(optimizer), ()) if state and key not in state]
        if missing:
            return (
                f"the state of parameter {i} lacks {', '.join(missing)}: another optimizer saved "
                f"this state dict; load one that was saved from {name}"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor) or key == "step" or key in scalars:
                continue
            if value.is_nested:  # has no shape to ask for
                continue
            wanted = _shape_of_entry(optimizer, p, key, live.get(p, {}).get(key))
            if wanted is not None and value.shape != wanted:
                return (
                    f"the state of parameter {i} has {key} of shape {tuple(value.shape)}, expected "
                    f"{tuple(wanted)}: it was saved for a parameter of another shape; load the "
                    "state of the same model"
                )
    return None


def _shape_of_entry(
    optimizer: Optimizer, p: Tensor, key: str, live: object
) -> Sequence[int] | None:
    """The shape that an entry of a parameter's state must have; None: nobody knows."""
    if isinstance(live, Tensor):
        return live.shape if is_of_torch(optimizer) or live.shape == p.shape else None
    if not is_of_torch(optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        return None
    shape = list(p.shape)
    if key in _MEAN_OVER and len(shape) > 1:
        shape[_MEAN_OVER[key]] = 1
    return torch.Size(shape)
