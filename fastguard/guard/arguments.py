"""What can be guarded, and how: the arguments of `GuardedOptimizer`, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.errors import TrainingDivergedError
from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.functional.arguments import warn_of_zero
from fastguard.guard.clip_scope import clip_values
from fastguard.guard.whole_step import WholeStep
from fastguard.guard.wrapper import OptimizerAround
from fastguard.ranks.dtensors import dtensor_types
from fastguard.ranks.groups import Group, check_group
from fastguard.ranks.plain_shards import check_sharded_optimizer
from fastguard.records.step_record import StepRecord

_P = ParamSpec("_P")

MODES = ("skip", "zero", "raise", "propagate")


def keywords_only(construct: Callable[_P, None]) -> Callable[_P, None]:
    """Around `__init__(self, optimizer, *, ...)`: says which keyword a positional argument needs.

    Python alone would only say how many positional arguments there are.
    """

    @wraps(construct)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if len(args) > 2:  # self and the optimizer
            number = isinstance(args[2], int | float)
            remedy = f"max_norm={shown(args[2])}" if number else "max_norm=1.0, nonfinite='skip'"
            raise TypeError(
                f"{type(args[0]).__name__} was given {shown(args[2])} as second positional "
                "argument; all but the optimizer are keywords: "
                f"{type(args[0]).__name__}(optimizer, {remedy})"
            )
        construct(*args, **kwargs)

    return checked


def check_optimizer(optimizer: object, group: Group) -> None:
    """Raises a TypeError or ValueError for what cannot be guarded over `group`."""
    check_group(group)
    if isinstance(optimizer, OptimizerAround):
        raise TypeError("the optimizer is guarded already; wrap the inner one: guarded.optimizer")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={shown(optimizer)} is no torch.optim.Optimizer; "
            "pass for example torch.optim.AdamW(model.parameters())"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam works on sparse gradients, which fastguard does not guard; use Adam with "
            "a dense embedding, or leave this optimizer unguarded"
        )
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"{type(optimizer).__name__} has no param_groups, so there is nothing to guard; wrap "
            "the optimizer inside it"
        )
    check_sharded_optimizer(optimizer, group)
    parameters = [p for param_group in optimizer.param_groups for p in param_group["params"]]
    if not parameters and group is None:
        raise ValueError("the optimizer has no parameters; there is nothing to guard")
    for param_group in optimizer.param_groups:
        check_settings(param_group, param_group["params"])
    if WholeStep.serves(optimizer):
        check_whole_step(optimizer, group)


def check_whole_step(optimizer: Optimizer, group: Group) -> None:
    """Raises a ValueError where ranks would have to take a step that evaluates its closure."""
    kinds = {type(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    if group is not None or dtensor_types(kinds):
        raise ValueError(
            f"{type(optimizer).__name__} decides by the loss of one rank how often it evaluates "
            "the model, and ranks would part; guard it in one process, without group"
        )


def check_settings(param_group: Mapping[str, Any], parameters: Iterable[Tensor]) -> None:
    """Raises a TypeError or ValueError for settings of a param group that cannot be guarded.

    Args:
        param_group: The settings.
        parameters: What they are for.
    """
    if param_group.get("differentiable"):
        raise ValueError(
            "differentiable=True needs gradients that are not changed in place; guard without it"
        )
    for _, limit in clip_values([param_group]):
        if limit == 0.0:
            warn_of_zero("clip_value")
        for p in parameters:
            if p.is_complex():
                raise TypeError(
                    f"a param group has clip_value={limit}, but its parameter of shape "
                    f"{tuple(p.shape)} is complex, and complex numbers have no order to clamp by; "
                    "use max_norm, or a param group of its own"
                )


def named_parameters_of(param_group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
    """The parameters of a group that is to be added, with their names if they have any.

    An iterator among them becomes a list, as torch makes it one: it can be read once.

    Raises:
        TypeError: It is no dict, or holds what is no tensor.
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(
            f"the param group is a {type(param_group).__name__}; pass a dict with 'params'"
        )
    given = param_group["params"]
    if isinstance(given, Tensor):
        return [(None, given)]
    if isinstance(given, Iterator):
        given = param_group["params"] = list(given)
    named: list[tuple[str | None, Tensor]] = []
    for item in given:
        name, p = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(p, Tensor):
            raise TypeError(f"the param group holds {p!r}, a {type(p).__name__}; pass parameters")
        named.append((name, p))
    return named


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ValueError for what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is unknown; use one of {', '.join(choices)}")


def check_budget(value: object) -> None:
    """Raises a ValueError for what is no number of skips."""
    if value is not None:
        count_of("max_consecutive_skips", value, 1, optional=True)


def raise_if_over_budget(record: StepRecord | None, limit: int | None) -> None:
    """Raises a TrainingDivergedError if a step was one skipped incident in a row too many."""
    if record is None or limit is None or not record.is_incident:
        return
    if record.consecutive_skips > limit:
        raise TrainingDivergedError(
            f"{record.consecutive_skips} steps in a row were skipped, more than "
            f"max_consecutive_skips={limit}. Last: {record}",
            record.culprits,
        )
