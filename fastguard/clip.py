"""The functions of `torch.nn.utils` for gradients, with the same arguments and results.

Each is the four stages without a state: measure, reduce, decide, apply. What differs from torch:
norms are true to 1e-7, gradients are read once and stay untouched at coefficient 1, and
`max_norm=inf` never multiplies.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastguard.apply import apply, scale
from fastguard.buckets import GradBuckets, bucketize, gradients_of, name_of
from fastguard.decide import (
    Policy,
    clip_coefficients,
    decide,
    raise_if_nonfinite,
    torch_total_norm,
)
from fastguard.measure import GradStats, measure, norm_type_of
from fastguard.reduce import Signals, reduce

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
MODES = ("propagate", "zero", "raise")


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    nonfinite: Literal["propagate", "zero", "raise"] = "propagate",
    group: None = None,
) -> Tensor:
    """Clips the gradients so that their joint norm is at most `max_norm`.

    Args:
        parameters: A tensor, an iterable of tensors, or of `(name, tensor)` pairs such as
            `model.named_parameters()`, so that errors can name the culprit.
        max_norm: The limit, >= 0; `inf` measures only and never multiplies.
        norm_type: p > 0 of the p-norm; `inf` for the largest magnitude.
        error_if_nonfinite: The same as `nonfinite="raise"`.
        foreach: Accepted for compatibility; there is one implementation a device.
        nonfinite: What NaN and Inf do: `"propagate"` as in torch, `"zero"` sets them to 0 and clips
            by the norm of the rest, `"raise"` raises before anything is changed. Skipping a step
            takes `GuardedOptimizer`.
        group: Reserved for several processes; None: this process holds the whole model.

    Returns:
        The norm before clipping, `()`, float32 (float64 if a gradient is), on the device of the
        first gradient. In propagate mode NaN or Inf if an element is; else of the finite elements.

    Raises:
        NonFiniteGradError: In raise mode; this waits for a GPU.
        TypeError, ValueError: An argument is not of the kind or range above.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> fastguard.clip_grad_norm_([p], max_norm=1.0)
        tensor(5.)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    p = norm_type_of(norm_type)
    mode = _mode(nonfinite, error_if_nonfinite)
    _check_foreach(foreach)
    grads, names = gradients_of(_listed(parameters))
    if torch.compiler.is_compiling():
        return _clip_compiled(grads, names, max_norm, p, mode)
    buckets = bucketize(grads, names=names, norm_type=p)
    return clip_buckets(buckets, max_norm, p, mode == "raise", mode, group=group)


def clip_buckets(
    buckets: GradBuckets,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    nonfinite: str = "propagate",
    group: None = None,
) -> Tensor:
    """The four stages over gradients that are sorted already; arguments as in `clip_grad_norm_`."""
    mode = _mode(nonfinite, error_if_nonfinite)
    limit = _limits(limit_of("max_norm", max_norm), buckets.device)
    stats = measure(buckets, norm_type_of(norm_type))
    stats, signals = reduce(stats, Signals.none(buckets.device), group)
    if mode == "raise":
        raise_if_nonfinite(stats)
    verdict = decide(stats, signals, None, Policy(limit, mode))
    apply(buckets, verdict)
    norm = torch_total_norm(stats) if mode == "propagate" else verdict.total_norm
    return norm if stats.float64 else norm.float()


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: None = None,
) -> Tensor:
    """The norm of all tensors together, as of one long vector. Nothing is changed.

    Args:
        tensors: A tensor, or an iterable of tensors (gradients, not parameters).
        norm_type: p > 0 of the p-norm; `inf` for the largest magnitude.
        error_if_nonfinite: Raise if an element is NaN or Inf; this waits for a GPU.
        foreach: Accepted for compatibility.
        group: Reserved for several processes; None: this process holds everything.

    Returns:
        `()`, float32 (float64 if a tensor is): NaN or Inf if an element is.

    Raises:
        NonFiniteGradError: With `error_if_nonfinite`, naming tensors and counts.

    Example:
        >>> import torch, fastguard
        >>> fastguard.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    p = norm_type_of(norm_type)
    _check_foreach(foreach)
    listed = [tensors] if isinstance(tensors, Tensor) else _as_list("tensors", tensors)
    if torch.compiler.is_compiling():
        mode = "raise" if error_if_nonfinite else "propagate"
        return _decide_compiled(listed, None, math.inf, p, mode)[0]
    buckets = bucketize(listed, norm_type=p)
    stats, _ = reduce(measure(buckets, p), Signals.none(buckets.device), group)
    if error_if_nonfinite:
        raise_if_nonfinite(stats)
    norm = torch_total_norm(stats)
    return norm if stats.float64 else norm.float()


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales the gradients by `min(1, max_norm / (total_norm + 1e-6))`.

    Args:
        parameters: As in `clip_grad_norm_`.
        max_norm: The limit, >= 0; `inf` never multiplies.
        total_norm: `()`, the norm, from `get_total_norm`. NaN makes every gradient NaN, as in
            torch.
        foreach: Accepted for compatibility.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> fastguard.clip_grads_with_norm_([p], 1.0, fastguard.get_total_norm([p.grad]))
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    _check_foreach(foreach)
    grads, names = gradients_of(_listed(parameters))
    if not isinstance(total_norm, Tensor | int | float):
        raise TypeError(
            f"total_norm={total_norm!r} is not a tensor; pass what get_total_norm returned"
        )
    norm = torch.as_tensor(total_norm)
    if norm.numel() != 1:
        raise ValueError(f"total_norm must be one number, but has shape {tuple(norm.shape)}")
    norm = norm.reshape(1).double()
    if torch.compiler.is_compiling():
        _scale_compiled(grads, max_norm, norm)
        return
    limit = _limits(limit_of("max_norm", max_norm), norm.device)
    buckets = bucketize(grads, names=names)
    scale(buckets, clip_coefficients(norm, limit), torch.zeros((), device=norm.device))


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps every gradient element to [-clip_value, clip_value]; NaN stays NaN.

    Args:
        parameters: As in `clip_grad_norm_`.
        clip_value: The limit, >= 0.
        foreach: Accepted for compatibility.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, -0.5])
        >>> fastguard.clip_grad_value_([p], 1.0)
        >>> p.grad
        tensor([ 1.0000, -0.5000])
    """
    _check_foreach(foreach)
    grads, names = gradients_of(_listed(parameters))
    if torch.compiler.is_compiling():
        present = [g for g in grads if g is not None]
        torch.ops.fastguard.clip_value(present, _limits(clip_value, torch.device("cpu")))
        return
    limit = limit_of("clip_value", clip_value)
    bucketize(grads, names=names)  # refuses what cannot be clamped, before anything is changed
    for i, grad in enumerate(grads):
        if grad is not None and grad.is_complex():
            raise TypeError(
                f"the gradient of {name_of(i, names)} is complex, and complex numbers have no "
                "order to clamp by; use clip_grad_norm_, or leave this parameter out"
            )
    for grad in grads:
        if grad is not None:
            grad.clamp_(-limit, limit)


@torch.no_grad()
def sanitize_grads_(
    parameters: Parameters, *, nan: float = 0.0, posinf: float = 0.0, neginf: float = 0.0
) -> GradStats:
    """Replaces non-finite elements of the gradients, and says what was found.

    Args:
        parameters: As in `clip_grad_norm_`.
        nan: What replaces NaN.
        posinf: What replaces +Inf.
        neginf: What replaces -Inf.

    Returns:
        The stats of the gradients as they were.

    Raises:
        TypeError, ValueError: An argument is not of the kind or range above.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([float("nan"), 4.0])
        >>> fastguard.sanitize_grads_([p]).culprits()
        [('parameter 0', 1, 0, 0)]
        >>> p.grad
        tensor([0., 4.])
    """
    fill = {"nan": nan, "posinf": posinf, "neginf": neginf}
    for name, value in fill.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number: it replaces what is not")
    grads, names = gradients_of(_listed(parameters))
    if torch.compiler.is_compiling():
        stats = _measure_compiled(grads, names, 2.0)
        for grad in grads:
            if grad is not None:
                grad.nan_to_num_(**fill)
        return stats
    buckets = bucketize(grads, names=names)
    for bucket in buckets.buckets:
        largest = torch.finfo(bucket.dtype).max
        for name, value in fill.items():
            if abs(value) > largest:
                raise ValueError(
                    f"{name}={value!r} is infinite in {bucket.dtype}; use at most {largest}"
                )
    stats = measure(buckets, 2.0)
    if any(fill.values()):
        for bucket in buckets.buckets:
            for grad in bucket.grads:
                grad.nan_to_num_(**fill)
    else:
        scale(buckets, torch.ones_like(stats.power_sum), stats.found_nonfinite)
    return stats


@torch.no_grad()
def measure_grads(
    parameters: Parameters,
    *,
    norm_type: float = 2.0,
    per_tensor: bool = False,
    group: None = None,
) -> GradStats:
    """Norm and non-finite counts of the gradients, from one read. Nothing is changed.

    Args:
        parameters: As in `clip_grad_norm_`.
        norm_type: p > 0 of the p-norm; `inf` for the largest magnitude.
        per_tensor: One segment a tensor, so that `power_sum` and `segment_norms` are `(T,)`.
        group: Reserved for several processes.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> stats = fastguard.measure_grads([("w", p)])
        >>> stats.total_norm, stats.culprits()
        (tensor(5.), [])
    """
    p = norm_type_of(norm_type)
    grads, names = gradients_of(_listed(parameters))
    if torch.compiler.is_compiling():
        return _measure_compiled(grads, names, p, per_tensor)
    segments = range(len(grads)) if per_tensor else None
    n_segments = len(grads) if per_tensor else 1
    buckets = bucketize(grads, segments=segments, n_segments=n_segments, names=names, norm_type=p)
    return reduce(measure(buckets, p), Signals.none(buckets.device), group)[0]


# Under torch.compile: one opaque op a stage.


def _clip_compiled(
    grads: list[Tensor | None],
    names: list[str] | None,
    max_norm: float,
    norm_type: float,
    mode: str,
) -> Tensor:
    norm, coef, clean = _decide_compiled(grads, names, max_norm, norm_type, mode)
    torch.ops.fastguard.apply([g for g in grads if g is not None], coef, clean)
    return norm


def _decide_compiled(
    grads: Sequence[Tensor | None],
    names: list[str] | None,
    max_norm: float,
    norm_type: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = _measure_compiled(grads, names, norm_type)
    limit = _limits(max_norm, stats.summary.device)
    norm, coef, clean = torch.ops.fastguard.decide(
        stats.summary, stats.counts, limit, norm_type, mode, names if mode == "raise" else None
    )
    return norm if stats.float64 else norm.float(), coef, clean


def _scale_compiled(grads: list[Tensor | None], max_norm: float, norm: Tensor) -> None:
    # For the inf-norm a power sum is the norm itself, and NaN is counted; the op checks the limit.
    summary = torch.cat([norm, norm.isnan().double(), norm.new_zeros(2)]).reshape(4, 1)
    counts = torch.zeros(3, 0, dtype=torch.int64, device=norm.device)
    _, coef, clean = torch.ops.fastguard.decide(
        summary, counts, _limits(max_norm, norm.device), math.inf, "propagate", None
    )
    torch.ops.fastguard.apply([g for g in grads if g is not None], coef, clean)


def _measure_compiled(
    grads: Sequence[Tensor | None],
    names: list[str] | None,
    norm_type: float,
    per_tensor: bool = False,
) -> GradStats:
    ids = [i for i, g in enumerate(grads) if g is not None]
    present = [g for g in grads if g is not None]
    op = torch.ops.fastguard.measure_tensors if per_tensor else torch.ops.fastguard.measure
    summary, counts = op(present, norm_type)
    if len(ids) < len(grads):
        counts = _spread(counts, ids, len(grads))
        summary = _spread(summary, ids, len(grads)) if per_tensor else summary
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in present)
    return GradStats(summary, counts, norm_type, names, wide)


def _spread(columns: Tensor, ids: list[int], n: int) -> Tensor:
    """The columns at the places `ids` among n; the others are zero."""
    spread = columns.new_zeros(columns.shape[0], n)
    spread[:, ids] = columns
    return spread


def _limits(max_norm: float, device: torch.device) -> Tensor:
    # Not torch.tensor(max_norm): under compile that would recompile for every value.
    return torch.ones(1, dtype=torch.float64, device=device) * max_norm


# Arguments.


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
        raise ValueError(
            f"{name}={value!r} must be >= 0: a negative or NaN limit would flip or destroy "
            "gradients; use float('inf') to measure only"
        )
    return limit


def _mode(nonfinite: object, error_if_nonfinite: bool) -> Literal["propagate", "zero", "raise"]:
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


def _check_foreach(foreach: object) -> None:
    if foreach is not None and not isinstance(foreach, bool):
        raise TypeError(f"foreach={foreach!r} must be True, False or None")


def _listed(parameters: Parameters) -> Tensor | list:
    if isinstance(parameters, Tensor):
        return parameters
    listed = _as_list("parameters", parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return listed


def _as_list(name: str, value: Iterable) -> list:
    try:
        return list(value)
    except TypeError:
        remedy = "model.parameters()" if name == "parameters" else "a list of gradients"
        raise TypeError(
            f"{name}={value!r} must be a tensor or an iterable of tensors; pass {remedy}"
        ) from None
