"""Arguments at the public edge: checked, named and put into one form."""

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
    """A limit as a float.

    Args:
        name: `"max_norm"` or `"clip_value"`.
        value: What was given for it.
        quiet: Do not warn of a limit of 0; for those who ask again at each step.

    Raises:
        TypeError: Not a number; a bool or text is none.
        ValueError: Negative, NaN, or beyond the largest float.
    """
    limit = number_of(name, value, "use a number >= 0")
    if not limit >= 0.0:  # NaN is not >= 0
        without = "clamp nothing" if name == "clip_value" else "measure only"
        raise ValueError(
            f"{name}={value!r} must be >= 0: a negative or NaN limit would flip or destroy "
            f"gradients; use float('inf') to {without}"
        )
    if limit == 0.0 and not quiet:
        warn_of_zero(name)
    return limit


class _Told:
    """The lines that have been warned; forgotten when other filters come into force, as Python
    forgets its own: a block of `warnings.catch_warnings` hears everything anew.
    """

    filters: object = None
    lines: ClassVar[set[tuple[str, str, int]]] = set()


def warn_of_zero(name: str) -> None:
    """Warns of a limit of 0, once for each line of the user's code that gives it.

    It means what it means in torch, but many libraries write "no clipping" so.
    """
    without = "leave clip_value out" if name == "clip_value" else "pass max_norm=None"
    _warn_once(
        f"{name}=0 sets every gradient to zero, as in torch, so nothing will be learned; to turn "
        f"clipping off, {without} (float('inf') in the functions)"
    )


def _warn_once(message: str) -> None:
    """Warns, once for each line of the user's code; compiled code does so while it is traced, since
    a graph cannot.
    """
    line, level = _line_of_the_caller()
    if _Told.filters is not warnings.filters:
        _Told.filters = warnings.filters
        _Told.lines.clear()
    if (message, *line) in _Told.lines:
        return
    _Told.lines.add((message, *line))
    warnings.warn(message, stacklevel=level)


def _line_of_the_caller() -> tuple[tuple[str, int], int]:
    """The file and line outside of fastguard and torch that runs now, and its `stacklevel` seen
    from the calling function.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS_AND_TORCHS):
        frame, level = frame.f_back, level + 1
    return (frame.f_code.co_filename, frame.f_lineno), level


def limit_beside(max_norm: float, like: Tensor) -> Tensor:
    """A limit for a decision of the kind of `like`, float64 `(1,)`.

    Not torch.tensor(max_norm): compiled code would be compiled again for every value.
    """
    return like.new_ones(1, dtype=torch.float64) * max_norm


def limit_tensor(max_norm: float, device: torch.device) -> Tensor:
    """A limit where the decision about plain tensors is taken, float64 `(1,)`; kept for later
    calls, and nobody writes to it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _filled(max_norm, device)  # a part of the graph, filled anew at each replay
    return _kept_limit(max_norm, device, current_stream_of(device))


@functools.lru_cache(maxsize=32)
def _kept_limit(max_norm: float, device: torch.device, stream: int) -> Tensor:
    """Made once: it would be one more launch of each call."""
    with lasting():
        return _filled(max_norm, device)


def _filled(max_norm: float, device: torch.device) -> Tensor:
    return torch.full((1,), max_norm, dtype=torch.float64, device=device)


def mode_of(nonfinite: object, error_if_nonfinite: bool) -> Literal["propagate", "zero", "raise"]:
    """Returns the mode that the two arguments select; raises a ValueError if they conflict."""
    if nonfinite not in MODES:
        remedy = "skipping a step takes fastguard.GuardedOptimizer" if nonfinite == "skip" else ""
        raise ValueError(
            f"nonfinite={shown(nonfinite)} is unknown here; use one of {', '.join(MODES)}"
            + (f"; {remedy}" if remedy else "")
        )
    if error_if_nonfinite and nonfinite == "zero":
        raise ValueError(
            "error_if_nonfinite=True contradicts nonfinite='zero'; choose one of the two"
        )
    return "raise" if error_if_nonfinite else nonfinite


def check_foreach(foreach: object) -> None:
    """Raises a TypeError unless `foreach` is a bool or None; it selects nothing here."""
    if foreach is not None and not isinstance(foreach, bool):
        raise TypeError(f"foreach={shown(foreach)} must be True, False or None")


def listed(parameters: Parameters, stacklevel: int = 5) -> Tensor | list[Any]:
    """What a user calls "parameters", to be read more than once; `stacklevel` is that of torch's
    warning about an empty generator.
    """
    if isinstance(parameters, Tensor):
        return parameters
    listed = as_list("parameters", parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        _warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel)
    return listed


def _warn(message: str, stacklevel: int) -> None:
    """Warns; compiled code does so while it is traced, since a graph cannot."""
    warnings.warn(message, stacklevel=stacklevel)


# What torch.compiler.assume_constant_result does, without importing the compiler (0.2 s).
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_list(name: str, value: Iterable[Any]) -> list[Any]:
    """Returns an iterable as a list; raises a TypeError with a remedy for anything else."""
    try:
        return list(value)
    except TypeError:
        remedy = "model.parameters()" if name == "parameters" else "a list of gradients"
        raise TypeError(
            f"{name}={shown(value)} must be a tensor or an iterable of tensors; pass {remedy}"
        ) from None


# What is called "parameters" in an API, and whether they can be such.


def gradients_for(
    parameters: Tensor | list[Any], strict: bool
) -> tuple[list[Tensor | None], list[str] | None]:
    """The gradients and names of checked parameters.

    Args:
        parameters: From `listed`.
        strict: Refuse tensors none of which can have a gradient; else they get a warning.
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
    """The gradients of this rank, partial ones made whole, and how much each counts.

    Args:
        parameters, strict: As in `gradients_for`.
        group: Whose gradients count.
        norm_type: The norm that will be taken.
        per_tensor: Make each tensor a segment.
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
    if not buckets.buckets:  # with a group, the other ranks would wait for one that raises
        _check_no_gradient(parameters, strict and process_group_of(group) is None)
    return buckets


def _sharing_of_gradients(parameters: list[Tensor], group: Group) -> Sharing | None:
    check_plain_shards(parameters, group, replaced=None)
    team = team_of(parameters, group)
    return None if team is None else team.sharing_of_gradients(parameters)


def _check_no_gradient(parameters: Tensor | list[Any], strict: bool) -> None:
    """Says so if tensors without a gradient can never have one: these are no parameters.

    Args:
        parameters: What a user calls so; none of them has a gradient.
        strict: Raise, where torch has no such function; else warn, since torch does nothing.

    Raises:
        TypeError: `strict`, and none of the tensors can get a gradient.
    """
    tensors = parameters_of(parameters)
    if len(tensors) == 0 or any(map(_may_have_gradient, tensors)):
        return
    message = (
        f"none of the {len(tensors)} tensors given as parameters has a .grad or requires one, so "
        "there is nothing to clip or to measure; if these are the gradients, pass the parameters "
        "they belong to (model.parameters()); if all are frozen, leave out the call"
    )
    if strict:
        raise TypeError(message)
    _warn_once(message)


def _may_have_gradient(p: Tensor) -> bool:
    # A gradient that was computed with create_graph=True requires one, but is no leaf.
    return p.requires_grad and (p.is_leaf or p.retains_grad)
