"""Checks the arguments of the public functions and converts them to one form."""

from __future__ import annotations

import functools
import os
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastguard import errors
from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.buckets import GradBuckets, bucketize, gradients_of, parameters_of
from fastguard.gradients.tensor_kinds import lasting
from fastguard.gradients.transfer import current_stream_of
from fastguard.ranks.groups import Group, check_same_tensors, process_group_of, several_ranks
from fastguard.ranks.plain_shards import check_plain_shards
from fastguard.ranks.team import Sharing, team_of

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
MODES = ("propagate", "zero", "raise")
_OURS_AND_TORCHS = tuple(
    os.path.dirname(package) + os.sep for package in (errors.__path__[0], str(torch.__file__))
)


def limit_of(name: str, value: object, *, quiet: bool = False) -> float:
    """Returns a limit as a float.

    Args:
        name: `"max_norm"` or `"clip_value"`.
        value: The argument.
        quiet: Whether to omit the warning about a limit of 0, for callers in each step.

    Raises:
        TypeError: `value` is not a number; a bool or a string is refused.
        ValueError: `value` is negative, NaN, or exceeds the largest float.
    """
    limit = number_of(name, value, "use a number >= 0")
    if not limit >= 0.0:  # this form of the comparison also rejects NaN
        without = "clamp nothing" if name == "clip_value" else "measure only"
        raise ValueError(
            f"{name}={value!r} must be >= 0: a negative or NaN limit would flip or destroy "
            f"gradients; use float('inf') to {without}"
        )
    if limit == 0.0 and not quiet:
        warn_of_zero(name)
    return limit


class _Warned:
    """The lines of code for which a warning was given, and the warning filters at that time.

    When the filters change, the lines are cleared, as Python does with its own registry. For
    example, a `warnings.catch_warnings` block gets all warnings again.
    """

    filters: object = None
    lines: ClassVar[set[tuple[str, str, int]]] = set()


def warn_of_zero(name: str) -> None:
    """Warns about a limit of 0, once per line of user code.

    As in torch, a limit of 0 sets gradients to zero; in many other libraries it turns clipping off.
    """
    without = "leave clip_value out" if name == "clip_value" else "pass max_norm=None"
    _warn_once(
        f"{name}=0 sets every gradient to zero, as in torch, so the model will not learn; to turn "
        f"clipping off, {without} (float('inf') in the functions)"
    )


def _warn_once(message: str) -> None:
    """Warns once per line of user code. Compiled code warns while it is traced."""
    line, level = _line_of_the_caller()
    if _Warned.filters is not warnings.filters:
        _Warned.filters = warnings.filters
        _Warned.lines.clear()
    if (message, *line) in _Warned.lines:
        return
    _Warned.lines.add((message, *line))
    warnings.warn(message, stacklevel=level)


def _line_of_the_caller() -> tuple[tuple[str, int], int]:
    """Returns the innermost file and line outside of fastguard and torch, and its `stacklevel`.

    The `stacklevel` is for `warnings.warn` in the calling function.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS_AND_TORCHS):
        frame, level = frame.f_back, level + 1
    return (frame.f_code.co_filename, frame.f_lineno), level


def limit_like(max_norm: float, like: Tensor) -> Tensor:
    """Returns a limit as a tensor with the device and kind of `like`, float64 `(1,)`.

    torch.tensor(max_norm) would cause a recompilation for every value.
    """
    return like.new_ones(1, dtype=torch.float64) * max_norm


def limit_tensor(max_norm: float, device: torch.device) -> Tensor:
    """Returns a limit as a plain tensor, float64 `(1,)`; cached and therefore read-only."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # the tensor is part of the graph and filled in each replay
        return _filled(max_norm, device)
    return _kept_limit(max_norm, device, current_stream_of(device))


@functools.lru_cache(maxsize=32)
def _kept_limit(max_norm: float, device: torch.device, stream: int) -> Tensor:
    """Caches the tensor, to save a kernel launch per call."""
    with lasting():
        return _filled(max_norm, device)


def _filled(max_norm: float, device: torch.device) -> Tensor:
    return torch.full((1,), max_norm, dtype=torch.float64, device=device)


def mode_of(nonfinite: object, error_if_nonfinite: bool) -> Literal["propagate", "zero", "raise"]:
    """Returns the mode that the two arguments select together.

    Raises:
        ValueError: `nonfinite` is not a mode, or contradicts `error_if_nonfinite`.
    """
    if nonfinite not in MODES:
        remedy = "; to skip steps, use fastguard.GuardedOptimizer" if nonfinite == "skip" else ""
        raise ValueError(
            f"nonfinite={shown(nonfinite)} is unknown here; use one of {', '.join(MODES)}{remedy}"
        )
    if error_if_nonfinite and nonfinite == "zero":
        raise ValueError(
            "error_if_nonfinite=True contradicts nonfinite='zero'; choose one of the two"
        )
    return "raise" if error_if_nonfinite else nonfinite


def check_foreach(foreach: object) -> None:
    """Raises a TypeError unless `foreach` is a bool or None."""
    if foreach is not None and not isinstance(foreach, bool):
        raise TypeError(f"foreach={shown(foreach)} must be True, False or None")


def listed(parameters: Parameters, stacklevel: int = 5) -> Tensor | list[Any]:
    """Returns the argument `parameters` as a tensor or a list.

    Args:
        parameters: The argument.
        stacklevel: The `stacklevel` of the warning about an empty generator.

    Raises:
        TypeError: The argument is neither a tensor nor iterable.
    """
    if isinstance(parameters, Tensor):
        return parameters
    listed = as_list("parameters", parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        _warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel)
    return listed


def _warn(message: str, stacklevel: int) -> None:
    """Warns. Compiled code warns while it is traced."""
    warnings.warn(message, stacklevel=stacklevel)


# Has the effect of torch.compiler.assume_constant_result, without importing the compiler (0.2 s).
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_list(name: str, value: Iterable[Any]) -> list[Any]:
    """Returns `value` as a list; if it is not iterable, raises a TypeError with its name."""
    try:
        return list(value)
    except TypeError:
        remedy = "model.parameters()" if name == "parameters" else "a list of gradients"
        raise TypeError(
            f"{name}={shown(value)} must be a tensor or an iterable of tensors; pass {remedy}"
        ) from None


# Collects the gradients of parameters, and checks whether tensors can be parameters.


def gradients_for(
    parameters: Tensor | list[Any], strict: bool
) -> tuple[list[Tensor | None], list[str] | None]:
    """Returns the gradients and the names of parameters.

    Args:
        parameters: From `listed`.
        strict: Whether to raise an error, not just warn, if no tensor can have a gradient.
    """
    grads, names = gradients_of(parameters)
    if all(g is None for g in grads):
        _check_no_gradient(parameters, strict)
    return grads, names


def buckets_for(
    parameters: Tensor | list[Any],
    group: Group,
    strict: bool,
    *,
    norm_type: float = 2.0,
    per_tensor: bool = False,
) -> GradBuckets:
    """Returns the gradients of this rank as buckets, with `Partial` DTensors reduced.

    Args:
        parameters, strict: As in `gradients_for`.
        group: The ranks whose gradients form the norm.
        norm_type: p of the norm.
        per_tensor: Whether each tensor is a segment.
    """
    sharing = None
    if process_group_of(group) is not None or several_ranks():
        if per_tensor:
            check_same_tensors(group, "per_tensor=True")
        sharing = _sharing_of_gradients(parameters_of(parameters), group)
    grads, names = gradients_of(parameters)
    n = len(grads) if per_tensor else 1
    buckets = bucketize(
        grads,
        segments=range(n) if per_tensor else None,
        n_segments=n,
        names=names,
        norm_type=norm_type,
        sharing=sharing,
    )
    # no error with a group, since it would make the other ranks wait forever
    if not buckets.buckets:
        _check_no_gradient(parameters, strict and process_group_of(group) is None)
    return buckets


def _sharing_of_gradients(parameters: list[Tensor], group: Group) -> Sharing | None:
    check_plain_shards(parameters, group, replaced=None)
    team = team_of(parameters, group)
    return None if team is None else team.sharing_of_gradients(parameters)


def _check_no_gradient(parameters: Tensor | list[Any], strict: bool) -> None:
    """Warns or raises an error if none of the tensors can have a gradient.

    If so, they are probably gradients instead of parameters, or all frozen.

    Args:
        parameters: The tensors; none of them has a gradient.
        strict: Whether to raise an error, as for functions that torch does not have. Otherwise
            warns, because torch's functions do nothing in this case.

    Raises:
        TypeError: With `strict`, if none of the tensors can have a gradient.
    """
    tensors = parameters_of(parameters)
    if len(tensors) == 0 or any(map(_may_have_gradient, tensors)):
        return
    message = (
        f"none of the {len(tensors)} tensors passed as parameters has a .grad or requires grad, "
        "so there is nothing to clip or measure; pass parameters (model.parameters()) instead of "
        "gradients, or leave out the call if all parameters are frozen"
    )
    if strict:
        raise TypeError(message)
    _warn_once(message)


def _may_have_gradient(p: Tensor) -> bool:
    # A gradient that was computed with create_graph=True requires grad, but is not a leaf.
    return p.requires_grad and (p.is_leaf or p.retains_grad)
