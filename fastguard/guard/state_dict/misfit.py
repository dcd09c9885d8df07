"""Finds out whether a loaded state belongs to another optimizer or model.

torch loads such a state without error, and the next step fails. The check runs after loading,
because hooks of the optimizer may adapt a state dict, and torch adds settings that older releases
did not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.guard.state_dict.casts import is_of_torch, parameters_of, scalar_entries

# Required entries of a parameter's state; other optimizers with the same settings lack them.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NEEDED: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: _MOMENTS,
    torch.optim.AdamW: _MOMENTS,
    torch.optim.NAdam: (*_MOMENTS, "mu_product"),
    torch.optim.RAdam: _MOMENTS,
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
}
# State of Adafactor that holds means over a dimension.
_MEAN_OVER = {"row_var": -1, "col_var": -2}


def misfit(
    optimizer: Optimizer, live: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> str | None:
    """Returns why a loaded state does not fit the optimizer; None if it fits.

    Args:
        optimizer: The optimizer after loading.
        live: The state of the optimizer before loading.
        groups: The param groups before loading. Only settings of these groups are required, since
            `defaults` of a custom optimizer may have entries that its groups lack.
    """
    name = type(optimizer).__name__
    for i, (group, own) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        missing = [key for key in optimizer.defaults if key in own and key not in group]
        if missing:
            return (
                f"param group {i} has no {', '.join(missing)}, so this state dict was not saved "
                f"by {name}; load a state dict that {name} has saved"
            )
    scalars = scalar_entries(optimizer)
    for i, p in enumerate(parameters_of(optimizer)):
        state = optimizer.state.get(p, {})
        if not isinstance(state, Mapping):
            return (
                f"the state of parameter {i} is a {type(state).__name__}, not a dict; "
                "pass the result of opt.state_dict()"
            )
        missing = [key for key in _NEEDED.get(type(optimizer), ()) if state and key not in state]
        if missing:
            return (
                f"the state of parameter {i} has no {', '.join(missing)}, so this state dict was "
                f"not saved by {name}; load a state dict that {name} has saved"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor) or key == "step" or key in scalars:
                continue
            if value.is_nested:  # nested tensors have no shape
                continue
            wanted = _shape_of_entry(optimizer, p, key, live.get(p, {}).get(key))
            if wanted is not None and value.shape != wanted:
                return (
                    f"the state of parameter {i} has {key} of shape {tuple(value.shape)}, but the "
                    f"parameter needs {tuple(wanted)}; load a state dict of the same model"
                )
    return None


def _shape_of_entry(
    optimizer: Optimizer, p: Tensor, key: str, live: object
) -> Sequence[int] | None:
    """Returns the required shape of a state entry; None: unknown."""
    if isinstance(live, Tensor):
        return live.shape if is_of_torch(optimizer) or live.shape == p.shape else None
    if not is_of_torch(optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        return None
    shape = list(p.shape)
    if key in _MEAN_OVER and len(shape) > 1:
        shape[_MEAN_OVER[key]] = 1
    return torch.Size(shape)
