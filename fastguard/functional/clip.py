"""The gradient functions of `torch.nn.utils`, with the same arguments and results.

Each function runs the four stages (measure, reduce, decide, apply) without state. Differences from
torch: norms have a relative error below 1e-7, gradients are read once and remain bitwise unchanged
if the coefficient is 1, and `max_norm=inf` never multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import number_of, refuse_bool_and_text, shown
from fastguard.functional import compiled
from fastguard.functional.arguments import (
    Parameters,
    as_list,
    buckets_for,
    check_foreach,
    gradients_for,
    limit_like,
    limit_of,
    limit_tensor,
    listed,
    mode_of,
)
from fastguard.gradients.buckets import GradBuckets, bucketize, name_of, parameters_of
from fastguard.gradients.elementwise import clamp_
from fastguard.gradients.tensor_kinds import PLAIN, TRACED, kind_of
from fastguard.ranks.dtensors import is_dtensor, make_whole_, whole
from fastguard.ranks.groups import Group, process_group_of, several_ranks
from fastguard.ranks.team import team_of
from fastguard.stages.apply import apply, scale
from fastguard.stages.contract import Policy, Signals
from fastguard.stages.decide import decide, raise_if_nonfinite
from fastguard.stages.formulas import clip_coefficients
from fastguard.stages.grad_stats import torch_total_norm
from fastguard.stages.measure import measure, norm_type_of
from fastguard.stages.reduce import reduce


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    nonfinite: Literal["propagate", "zero", "raise"] = "propagate",
    group: Group = None,
) -> Tensor:
    """Clips the gradients in place so that their total norm is at most `max_norm`.

    Args:
        parameters: A tensor, or an iterable of tensors or of `(name, tensor)` pairs such as
            `model.named_parameters()`; names appear in error messages.
        max_norm: The limit, >= 0; `inf`: measure only, never multiply.
        norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.
        error_if_nonfinite: True: the same as `nonfinite="raise"`. Default: False.
        foreach: Accepted for compatibility; there is one implementation per device.
        nonfinite: How to handle NaN and Inf. `"propagate"`: as in torch. `"zero"`: NaN and Inf are
            set to 0, and the norm is computed from the remaining elements. `"raise"`: an error is
            raised before anything is changed. To skip steps, use `GuardedOptimizer`. Default:
            `"propagate"`.
        group: The ranks whose gradients form the norm. None: this process, or the ranks that the
            meshes of DTensors span. A process group: all its ranks, which hold different tensors
            (pipeline stages, experts). `fastguard.Replicated(process_group)`: all its ranks, which
            hold the same tensors (DDP). All ranks must make the call, even those without
            parameters.

    Returns:
        The norm before clipping, `()`, float32 (float64 if any gradient is), on the device of the
        first gradient. In propagate mode, it is NaN or Inf if any element is; otherwise it is the
        norm of the finite elements.

    Raises:
        NonFiniteGradError: A gradient is non-finite, in raise mode; this waits for a GPU. With
            `error_if_nonfinite`, the message begins with torch's message.
        TypeError, ValueError: An argument has the wrong type or is out of range; or none of the
            tensors can have a gradient (with `nonfinite="propagate"` only a warning, because torch
            does nothing).

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
    mode = mode_of(nonfinite, error_if_nonfinite)
    # `nonfinite` is not an argument of torch, so an error breaks no torch code
    strict = nonfinite != "propagate"
    check_foreach(foreach)
    parameters = listed(parameters)
    if torch.compiler.is_compiling():
        if compiled.spans_ranks(parameters, group):
            return compiled.leave_graph(
                clip_grad_norm_,
                parameters,
                max_norm,
                p,
                error_if_nonfinite,
                nonfinite=nonfinite,
                group=group,
            )
        grads, names = gradients_for(parameters, strict)
        return compiled.clip_grad_norm_(grads, names, max_norm, p, mode, error_if_nonfinite)
    buckets = buckets_for(parameters, group, strict, norm_type=p)
    return clip_buckets(buckets, max_norm, p, error_if_nonfinite, nonfinite)


def clip_buckets(
    buckets: GradBuckets,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    nonfinite: str = "propagate",
) -> Tensor:
    """Clips gradients in buckets by their norm; arguments and result as in `clip_grad_norm_`."""
    mode = mode_of(nonfinite, error_if_nonfinite)
    max_norm = limit_of("max_norm", max_norm)
    stats = measure(buckets, norm_type_of(norm_type))
    stats, signals = reduce(stats, Signals.none_beside(stats), buckets.sharing)
    if stats.kind is TRACED:
        norm, multiplier, clean = compiled.decided(stats, max_norm, mode, error_if_nonfinite)
        scale(buckets, multiplier, clean)
        return norm
    if mode == "raise":
        raise_if_nonfinite(stats, signals, as_torch=error_if_nonfinite)
    if stats.kind is PLAIN:
        limit = limit_tensor(max_norm, buckets.device)
    else:
        limit = limit_like(max_norm, stats.summary)
    policy = Policy(limit, mode, limited=max_norm != math.inf)
    verdict = decide(stats, signals, None, policy)
    if policy.may_change(signals):
        apply(buckets, verdict)
    norm = verdict.torch_norm if mode == "propagate" else verdict.total_norm
    return norm if stats.float64 else norm.float()


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Group = None,
) -> Tensor:
    """Computes the norm of all tensors, as if concatenated into one vector. Changes nothing.

    Args:
        tensors: A tensor, or an iterable of tensors (gradients, not parameters).
        norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.
        error_if_nonfinite: Whether to raise an error if any element is NaN or Inf; this waits for a
            GPU. Default: False.
        foreach: Accepted for compatibility.
        group: As in `clip_grad_norm_`.

    Returns:
        The norm, `()`, float32 (float64 if any tensor is); NaN or Inf if any element is.

    Raises:
        NonFiniteGradError: An element is NaN or Inf, with `error_if_nonfinite`; the message lists
            tensors and counts.
        TypeError, ValueError: An argument has the wrong type or is out of range.

    Example:
        >>> import torch, fastguard
        >>> fastguard.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    p = norm_type_of(norm_type)
    check_foreach(foreach)
    items = [tensors] if isinstance(tensors, Tensor) else as_list("tensors", tensors)
    if torch.compiler.is_compiling():
        if compiled.spans_ranks(items, group):
            return compiled.leave_graph(get_total_norm, items, p, error_if_nonfinite, group=group)
        mode = "raise" if error_if_nonfinite else "propagate"
        return compiled.decide(items, None, math.inf, p, mode, error_if_nonfinite)[0]
    sharing = None
    if process_group_of(group) is not None or several_ranks():
        items = [whole(t) for t in items]
        team = team_of(items, group)
        sharing = None if team is None else team.sharing(items)
    buckets = bucketize(items, norm_type=p, sharing=sharing)
    stats = measure(buckets, p)
    stats, signals = reduce(stats, Signals.none_beside(stats), sharing)
    if stats.kind is TRACED:
        mode = "raise" if error_if_nonfinite else "propagate"
        return compiled.decided(stats, math.inf, mode, error_if_nonfinite)[0]
    if error_if_nonfinite:
        raise_if_nonfinite(stats, signals, as_torch=True)
    norm = torch_total_norm(stats)
    return norm if stats.float64 else norm.float()


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Multiplies the gradients in place by `min(1, max_norm / (total_norm + 1e-6))`.

    Args:
        parameters: As in `clip_grad_norm_`.
        max_norm: The limit, >= 0; `inf`: never multiply.
        total_norm: The norm from `get_total_norm`: a tensor with one element, or a number. NaN
            makes every gradient NaN, as in torch.
        foreach: Accepted for compatibility.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> fastguard.clip_grads_with_norm_([p], 1.0, fastguard.get_total_norm([p.grad]))
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    check_foreach(foreach)
    parameters = listed(parameters)
    refuse_bool_and_text("total_norm", total_norm, "pass the result of get_total_norm")
    if not isinstance(total_norm, (Tensor, int, float)):
        raise TypeError(
            f"total_norm={shown(total_norm)} is not a tensor; pass the result of get_total_norm"
        )
    if torch.compiler.is_compiling() and compiled.spans_ranks(parameters, None):
        compiled.leave_graph(clip_grads_with_norm_, parameters, max_norm, total_norm)
        return
    if not isinstance(total_norm, Tensor):
        # `torch.as_tensor` would cause a recompilation for every value.
        total_norm = limit_like(number_of("total_norm", total_norm), torch.empty(0, device="cpu"))
    norm = total_norm
    if is_dtensor(norm):  # torch returns the norm of DTensors as a Partial that is not reduced yet
        norm = norm.full_tensor()
    if norm.numel() != 1:
        raise ValueError(
            f"total_norm has shape {tuple(norm.shape)}, but must hold one number; pass the result "
            "of get_total_norm"
        )
    norm = norm.reshape(1).double()
    grads, names = gradients_for(parameters, strict=False)
    if torch.compiler.is_compiling():
        compiled.clip_grads_with_norm_(grads, max_norm, norm)
        return
    limit = limit_of("max_norm", max_norm)
    buckets = bucketize(grads, names=names)
    if buckets.kind is PLAIN and kind_of((type(norm),)) is PLAIN:
        limits, clean = limit_tensor(limit, norm.device), torch.zeros((), device=norm.device)
    else:
        limits, clean = limit_like(limit, norm), norm.new_zeros((), dtype=torch.float32)
    scale(buckets, clip_coefficients(norm, limits), clean)


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps the elements of the gradients in place to [-clip_value, clip_value]; NaN stays NaN.

    Args:
        parameters: As in `clip_grad_norm_`.
        clip_value: The limit, >= 0; a limit above the largest value of a dtype has no effect.
        foreach: Accepted for compatibility.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range; or a gradient is
            complex.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, -0.5])
        >>> fastguard.clip_grad_value_([p], 1.0)
        >>> p.grad
        tensor([ 1.0000, -0.5000])
    """
    check_foreach(foreach)
    parameters = listed(parameters)
    if torch.compiler.is_compiling():
        if compiled.spans_ranks(parameters, None):
            compiled.leave_graph(clip_grad_value_, parameters, clip_value)
        else:
            compiled.clip_grad_value_(gradients_for(parameters, strict=False)[0], clip_value)
        return
    limit = limit_of("clip_value", clip_value)
    if several_ranks():  # reduces `Partial` DTensors; clamping itself needs no collective
        make_whole_(parameters_of(parameters))
    grads, names = gradients_for(parameters, strict=False)
    buckets = bucketize(grads, names=names)  # raises errors before any change
    for i, grad in enumerate(grads):
        if grad is not None and grad.is_complex():
            raise TypeError(
                f"the gradient of {name_of(i, names)} is complex, but clamping needs real numbers; "
                "use clip_grad_norm_, or leave this parameter out"
            )
    clamp_(buckets, limit)
