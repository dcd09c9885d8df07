"""`measure_grads` and `sanitize_grads_`: functions for gradients that torch does not have."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastguard.errors.checked_numbers import finite_number_of
from fastguard.functional import compiled
from fastguard.functional.arguments import Parameters, buckets_for, gradients_for, listed
from fastguard.gradients.elementwise import check_fill, fill_nonfinite_
from fastguard.ranks.groups import Group
from fastguard.stages.apply import scale
from fastguard.stages.contract import Signals
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure, norm_type_of
from fastguard.stages.reduce import reduce

_NUMPY = (np.ndarray, np.generic)


@torch.no_grad()
def sanitize_grads_(
    parameters: Parameters,
    *,
    nan: float = 0.0,
    posinf: float = 0.0,
    neginf: float = 0.0,
    group: Group = None,
) -> GradStats:
    """Replaces non-finite elements of the gradients in place, and returns their counts.

    Args:
        parameters: As in `clip_grad_norm_`.
        nan: The finite number that replaces NaN. Default: 0.
        posinf: The finite number that replaces +Inf. Default: 0.
        neginf: The finite number that replaces -Inf. Default: 0.
        group: As in `clip_grad_norm_`.

    Returns:
        The stats of the gradients before the replacement.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range; or none of the
            tensors can have a gradient.

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
        # While tracing, the value of a tensor or a numpy number is unknown, so the op checks the
        # value.
        if not (torch.compiler.is_compiling() and isinstance(value, (Tensor, *_NUMPY))):
            fill[name] = finite_number_of(name, value, "the number replaces non-finite elements")
    parameters = listed(parameters)
    if torch.compiler.is_compiling():
        if compiled.spans_ranks(parameters, group):
            return compiled.leave_graph(sanitize_grads_, parameters, **fill, group=group)
        return compiled.sanitize_grads_(*gradients_for(parameters, strict=True), fill)
    buckets = buckets_for(parameters, group, strict=True)
    check_fill(buckets, fill)
    stats = measure(buckets, 2.0)
    stats, _ = reduce(stats, Signals.none_beside(stats), buckets.sharing)
    if any(fill.values()):
        fill_nonfinite_(buckets, fill)
    else:
        scale(buckets, torch.ones_like(stats.power_sum), stats.found_nonfinite)
    return stats


@torch.no_grad()
def measure_grads(
    parameters: Parameters,
    *,
    norm_type: float = 2.0,
    per_tensor: bool = False,
    group: Group = None,
) -> GradStats:
    """Measures the norm and the non-finite counts of the gradients in one pass. Changes nothing.

    Args:
        parameters: As in `clip_grad_norm_`.
        norm_type: p > 0 of the p-norm; `inf`: the largest magnitude. Default: 2.
        per_tensor: Whether each tensor is a segment, so that `power_sum` and `segment_norms` have
            one entry per tensor. Default: False, one segment for all.
        group: As in `clip_grad_norm_`.

    Returns:
        The stats of the gradients.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range; or none of the
            tensors can have a gradient.

    Example:
        >>> import torch, fastguard
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> stats = fastguard.measure_grads([("w", p)])
        >>> stats.total_norm, stats.culprits()
        (tensor(5.), [])
    """
    p = norm_type_of(norm_type)
    parameters = listed(parameters)
    if torch.compiler.is_compiling():
        if compiled.spans_ranks(parameters, group):
            return compiled.leave_graph(
                measure_grads, parameters, norm_type=p, per_tensor=per_tensor, group=group
            )
        return compiled.measure(*gradients_for(parameters, strict=True), p, per_tensor)
    buckets = buckets_for(parameters, group, strict=True, norm_type=p, per_tensor=per_tensor)
    stats = measure(buckets, p)
    return reduce(stats, Signals.none_beside(stats), buckets.sharing)[0]
