"""Arguments at the public edge: checked, named and put into one form."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fastguard.transfer import current_stream_of

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
MODES = ("propagate", "zero", "raise")


def limit_of(name: str, value: object) -> float:
    """A limit as a float.

    Raises:
        TypeError: Not a number.
        ValueError: Negative or NaN.
    """
    try:
        limit = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}={value!r} is not a number; use a number >= 0") from None
    if not limit >= 0.0:  # NaN is not >= 0
        without = "clamp nothing" if name == "clip_value" else "measure only"
        raise ValueError(
            f"{name}={value!r} must be >= 0: a negative or NaN limit would flip or destroy "
            f"gradients; use float('inf') to {without}"
        )
    return limit


def limit_tensor(max_norm: float, device: torch.device) -> Tensor:
    """A limit where the decision is taken, float64 `(1,)`; nobody writes to it."""
    if torch.compiler.is_compiling():
        # Not torch.tensor(max_norm): that would recompile for every value.
        return torch.ones(1, dtype=torch.float64, device=device) * max_norm
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _filled(max_norm, device)  # a part of the graph, filled anew at each replay
    return _kept_limit(max_norm, device, current_stream_of(device))


@functools.lru_cache(maxsize=32)
def _kept_limit(max_norm: float, device: torch.device, stream: int) -> Tensor:
    """Made once: it would be one more launch of each call."""
    with torch.inference_mode(False):
        return _filled(max_norm, device)


def _filled(max_norm: float, device: torch.device) -> Tensor:
    return torch.full((1,), max_norm, dtype=torch.float64, device=device)


def mode_of(nonfinite: object, error_if_nonfinite: bool) -> Literal["propagate", "zero", "raise"]:
    if nonfinite not in MODES:
        remedy = "skipping a step takes fastguard.GuardedOptimizer" if nonfinite == "skip" else ""
        raise ValueError(
            f"nonfinite={nonfinite!r} is unknown here; use one of {', '.join(MODES)}"
            + (f"; {remedy}" if remedy else "")
        )
    if error_if_nonfinite and nonfinite == "zero":
        raise ValueError(
            "error_if_nonfinite=True contradicts nonfinite='zero'; choose one of the two"
        )
    return "raise" if error_if_nonfinite else nonfinite


def check_foreach(foreach: object) -> None:
    if foreach is not None and not isinstance(foreach, bool):
        raise TypeError(f"foreach={foreach!r} must be True, False or None")


def listed(parameters: Parameters) -> Tensor | list:
    if isinstance(parameters, Tensor):
        return parameters
    listed = as_list("parameters", parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return listed


def as_list(name: str, value: Iterable) -> list:
    try:
        return list(value)
    except TypeError:
        remedy = "model.parameters()" if name == "parameters" else "a list of gradients"
        raise TypeError(
            f"{name}={value!r} must be a tensor or an iterable of tensors; pass {remedy}"
        ) from None
