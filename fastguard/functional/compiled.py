"""The functions of `fastguard.functional.clip` under `torch.compile`: one custom op per stage.

They are for a single process: calls that need collectives break the graph and run eagerly.

The ops report invalid gradients and limits while the graph runs. An invalid choice
(`nonfinite="drop"`, `foreach="yes"`) is found while tracing. It breaks the graph and raises an
error; with `fullgraph=True`, dynamo reports `Unsupported: Observed exception` instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard.errors.checked_numbers import refuse_bool_and_text
from fastguard.functional import ops as _registered  # noqa: F401  (`torch.ops.fastguard`)
from fastguard.functional.arguments import limit_like
from fastguard.gradients.buckets import parameters_of
from fastguard.ranks.dtensors import is_dtensor
from fastguard.ranks.groups import Group, process_group_of
from fastguard.stages.formulas import holds_norms
from fastguard.stages.grad_stats import GradStats


def clip_grad_norm_(
    grads: list[Tensor | None],
    names: list[str] | None,
    max_norm: float,
    norm_type: float,
    mode: str,
    as_torch: bool = False,
) -> Tensor:
    """Clips gradients by their norm: see `fastguard.clip_grad_norm_`."""
    refuse_bool_and_text("max_norm", max_norm)
    norm, coef, clean = decide(grads, names, max_norm, norm_type, mode, as_torch)
    _apply(_present(grads), coef, clean)
    return norm


def decide(
    grads: Sequence[Tensor | None],
    names: list[str] | None,
    max_norm: float,
    norm_type: float,
    mode: str,
    as_torch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measures the gradients, then decides: see `decided`."""
    return decided(measure(grads, names, norm_type), max_norm, mode, as_torch)


def decided(
    stats: GradStats, max_norm: float, mode: str, as_torch: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm `()`, the multiplier float64 `(S,)`, and whether to clean, float32 `()`."""
    limit = limit_like(max_norm, stats.summary)
    names = None if mode != "raise" or stats.names is None else list(stats.names)
    norm, coef, clean = torch.ops.fastguard.decide(
        stats.summary, stats.counts, limit, stats.norm_type, mode, names, as_torch, stats.rooted
    )
    return norm if stats.float64 else norm.float(), coef, clean


def clip_grads_with_norm_(grads: list[Tensor | None], max_norm: float, norm: Tensor) -> None:
    """Clips gradients by a given norm, float64 `(1,)`."""
    refuse_bool_and_text("max_norm", max_norm)
    # The norm is passed as an inf-norm, whose power sum is the norm itself. A NaN is passed as a
    # count of one NaN element. The op checks the limit.
    summary = torch.cat([norm, norm.isnan().double(), norm.new_zeros(2)]).reshape(4, 1)
    counts = torch.zeros(3, 0, dtype=torch.int64, device=norm.device)
    _, coef, clean = decided(GradStats(summary, counts, math.inf), max_norm, "propagate")
    _apply(_present(grads), coef, clean)


def measure(
    grads: Sequence[Tensor | None],
    names: list[str] | None,
    norm_type: float,
    per_tensor: bool = False,
) -> GradStats:
    """Measures the gradients; None entries count as tensors without elements."""
    ids = [i for i, g in enumerate(grads) if g is not None]
    present = _present(grads)
    if len(present) == 0:  # ops cannot be traced with an empty list
        n_segments = len(grads) if per_tensor else 1
        nothing = torch.zeros(4, n_segments, dtype=torch.float64, device="cpu")
        counts = torch.zeros(3, len(grads), dtype=torch.int64, device="cpu")
        return GradStats(nothing, counts, norm_type, names)
    op = torch.ops.fastguard.measure_tensors if per_tensor else torch.ops.fastguard.measure
    summary, counts = op(present, norm_type)
    if len(ids) < len(grads):
        counts = _spread(counts, ids, len(grads))
        summary = _spread(summary, ids, len(grads)) if per_tensor else summary
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in present)
    rooted = holds_norms(torch.float64 if wide else torch.float32, norm_type)
    return GradStats(summary, counts, norm_type, names, wide, rooted)


def _spread(columns: Tensor, ids: list[int], n: int) -> Tensor:
    """Returns a tensor of n columns: the given columns at the positions `ids`, else zeros."""
    spread = columns.new_zeros(columns.shape[0], n)
    spread[:, ids] = columns
    return spread


def clip_grad_value_(grads: list[Tensor | None], clip_value: float) -> None:
    """Clamps gradients to [-clip_value, clip_value]."""
    refuse_bool_and_text("clip_value", clip_value)
    present = _present(grads)
    if len(present) > 0:
        on_host = torch.empty(0, device="cpu")
        torch.ops.fastguard.clip_value(present, limit_like(clip_value, on_host))


def sanitize_grads_(
    grads: list[Tensor | None], names: list[str] | None, fill: dict[str, float]
) -> GradStats:
    """Replaces non-finite elements; returns the stats of the original gradients."""
    stats = measure(grads, names, 2.0)
    present = _present(grads)
    if len(present) == 0:
        return stats
    if any(not isinstance(value, (int, float)) or value for value in fill.values()):
        on_host = torch.empty(0, device="cpu")
        values = torch.cat([limit_like(value, on_host) for value in fill.values()])
        torch.ops.fastguard.sanitize(present, values)
    else:
        one = torch.ones(1, dtype=torch.float64, device=stats.summary.device)
        _apply(present, one, stats.found_nonfinite)
    return stats


def _present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _apply(grads: list[Tensor], multiplier: Tensor, clean: Tensor) -> None:
    if len(grads) > 0:
        torch.ops.fastguard.apply(grads, multiplier, clean)


def spans_ranks(parameters: Tensor | list[Any], group: Group) -> bool:
    """Whether compiled code must leave its graph, because collectives are needed."""
    if process_group_of(group) is not None:
        return True
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(is_dtensor(p) for p in parameters_of(parameters))


@torch._disable_dynamo
def leave_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function eagerly, which is an error under `fullgraph=True`."""
    return function(*args, **kwargs)
