"""Checks of the arguments of `GuardedOptimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fastguard.errors import TrainingDivergedError, nearest
from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.functional.arguments import warn_of_zero
from fastguard.guard.clip_scope import clip_values
from fastguard.guard.whole_step import WholeStep
from fastguard.guard.wrapper import OptimizerWrapper
from fastguard.ranks.dtensors import dtensor_types
from fastguard.ranks.groups import Group, check_group
from fastguard.ranks.plain_shards import check_sharded_optimizer
from fastguard.records.step_record import StepRecord

_P = ParamSpec("_P")

MODES = ("skip", "zero", "raise", "propagate")


def keywords_only(construct: Callable[_P, None]) -> Callable[_P, None]:
    """Decorates `__init__(self, optimizer, *, ...)` to suggest keywords for wrong arguments.

    Python's own errors for a positional or unknown argument suggest none.
    """
    known = [*signature(construct).parameters][1:]

    @wraps(construct)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for key in kwargs:
            if key not in known:
                raise TypeError(
                    f"{type(args[0]).__name__} has no argument {key!r}{nearest(key, known)}"
                )
        if len(args) > 2:  # self and the optimizer
            number = isinstance(args[2], int | float)
            remedy = f"max_norm={shown(args[2])}" if number else "max_norm=1.0, nonfinite='skip'"
            raise TypeError(
                f"{type(args[0]).__name__} got {shown(args[2])} as second positional argument, "
                "but takes only keyword arguments after the optimizer; pass "
                f"{type(args[0]).__name__}(optimizer, {remedy})"
            )
        construct(*args, **kwargs)

    return checked


def check_optimizer(optimizer: object, group: Group) -> None:
    """Raises a TypeError or ValueError for an optimizer that cannot be guarded over `group`."""
    check_group(group)
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError("the optimizer is already guarded; pass its `.optimizer` instead")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={shown(optimizer)} must be a torch.optim.Optimizer, such as "
            "torch.optim.AdamW(model.parameters())"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam takes sparse gradients, but fastguard guards only dense ones; use Adam "
            "with a dense embedding, or leave this optimizer unguarded"
        )
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"{type(optimizer).__name__} has no param_groups, so it cannot be guarded; pass the "
            "optimizer that it contains"
        )
    check_sharded_optimizer(optimizer, group)
    parameters = [p for param_group in optimizer.param_groups for p in param_group["params"]]
    if not parameters and group is None:
        raise ValueError(
            "the optimizer has no parameters to guard; pass an optimizer with parameters"
        )
    for param_group in optimizer.param_groups:
        check_settings(param_group, param_group["params"])
    if WholeStep.serves(optimizer):
        check_whole_step(optimizer, group)


def check_whole_step(optimizer: Optimizer, group: Group) -> None:
    """Raises a ValueError if an optimizer on several ranks evaluates a closure in its step."""
    kinds = {type(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    if group is not None or dtensor_types(kinds):
        raise ValueError(
            f"{type(optimizer).__name__} evaluates its closure as often as the loss of this rank "
            "requires, so the ranks would diverge; guard this optimizer in a single process, "
            "without group"
        )


def check_settings(param_group: Mapping[str, Any], parameters: Iterable[Tensor]) -> None:
    """Raises a TypeError or ValueError for settings of a param group that cannot be guarded.

    Args:
        param_group: The settings.
        parameters: The parameters of the group.
    """
    if param_group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported, because the guard changes gradients in place; "
            "pass differentiable=False"
        )
    for _, limit in clip_values([param_group]):
        if limit == 0.0:
            warn_of_zero("clip_value")
        for p in parameters:
            if p.is_complex():
                raise TypeError(
                    f"a param group has clip_value={limit} and a complex parameter of shape "
                    f"{tuple(p.shape)}, but clamping needs real numbers; use max_norm, or put the "
                    "parameter in a separate group"
                )


def named_parameters_of(param_group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Returns the parameters of a new param group, with names or None.

    An iterator in the group is replaced with a list, since it can be read only once.

    Raises:
        TypeError: The group is not a dict, or holds something other than tensors.
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
            raise TypeError(
                f"the param group holds {shown(p)}, a {type(p).__name__}; pass parameters"
            )
        named.append((name, p))
    return named


def names_by_tensor(
    named: Iterable[tuple[str, Tensor]] | None, groups: Iterable[Mapping[str, Any]]
) -> dict[Tensor, str]:
    """Returns the name of each parameter; for a shared parameter, its first name.

    Args:
        named: `(name, parameter)` pairs; None: no names.
        groups: `optimizer.param_groups`; at least one of their parameters must have a name.

    Raises:
        TypeError: `named` does not hold such pairs.
        ValueError: `named` contains none of the parameters.
    """
    if named is None:
        return {}
    if isinstance(named, Module):
        raise TypeError(
            f"named_parameters is a {type(named).__name__}; pass model.named_parameters()"
        )
    names: dict[Tensor, str] = {}
    for item in named:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                f"named_parameters yields a {type(item).__name__}, not a (name, parameter) "
                "pair; pass model.named_parameters()"
            )
        names.setdefault(item[1], item[0])
    parameters = [p for group in groups for p in group["params"]]
    if parameters and not any(p in names for p in parameters):
        what = (
            "the names belong to another model"
            if names
            else "named_parameters is empty (an exhausted generator?)"
        )
        raise ValueError(
            f"named_parameters contains none of the optimizer's {len(parameters)} parameters: "
            f"{what}; pass named_parameters() of the model that the optimizer updates"
        )
    return names


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ValueError if `value` is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is unknown; use one of {', '.join(choices)}")


def check_flat_choice(name: str, value: object) -> None:
    """Raises a ValueError if `value` is neither a bool nor `"trusted"`."""
    if not isinstance(value, bool) and value != "trusted":
        raise ValueError(f"{name}={shown(value)} is unknown; use True, False or 'trusted'")


def check_budget(value: object) -> None:
    """Raises a TypeError or ValueError if `value` is neither None nor a count of skips."""
    if value is not None:
        count_of("max_consecutive_skips", value, 1, optional=True)


def raise_if_over_budget(record: StepRecord | None, limit: int | None) -> None:
    """Raises a TrainingDivergedError if more consecutive incidents than the limit were skipped."""
    if record is None or limit is None or not record.is_incident:
        return
    if record.consecutive_skips > limit:
        raise TrainingDivergedError(
            f"{record.consecutive_skips} steps in a row were skipped, more than "
            f"max_consecutive_skips={limit}. Last: {record}",
            record.culprits,
        )
