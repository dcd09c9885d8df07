"""What can be guarded, and how: the arguments of `GuardedOptimizer`, checked."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from fastguard.delegation import OptimizerAround
from fastguard.ranks.dtensors import dtensor_types
from fastguard.ranks.groups import Group, check_group
from fastguard.whole_step import WholeStep

MODES = ("skip", "zero", "raise", "propagate")


def check_optimizer(optimizer: object, group: Group) -> None:
    """Raises a TypeError or ValueError for what cannot be guarded over `group`."""
    check_group(group)
    if isinstance(optimizer, OptimizerAround):
        raise TypeError("the optimizer is guarded already; wrap the inner one: guarded.optimizer")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is no torch.optim.Optimizer; "
            "pass for example torch.optim.AdamW(model.parameters())"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam works on sparse gradients, which fastguard does not guard; use Adam with "
            "a dense embedding, or leave this optimizer unguarded"
        )
    parameters = [p for param_group in optimizer.param_groups for p in param_group["params"]]
    if not parameters and group is None:
        raise ValueError("the optimizer has no parameters; there is nothing to guard")
    if any(param_group.get("differentiable") for param_group in optimizer.param_groups):
        raise ValueError(
            "differentiable=True needs gradients that are not changed in place; guard without it"
        )
    shared = group is not None or dtensor_types(set(map(type, parameters)))
    if shared and WholeStep.serves(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} decides by the loss of one rank how often it evaluates "
            "the model, and ranks would part; guard it in one process, without group"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ValueError for what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")


def check_budget(value: object) -> None:
    """Raises a ValueError for what is no number of skips."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"max_consecutive_skips={value!r} must be None or an integer >= 1")
