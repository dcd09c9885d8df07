"""Custom ops for `torch.compile`, one per stage: schema, implementation and shapes.

Eager code calls the stages directly, since the dispatcher costs 0.1 µs per tensor in a list.
Compiled code needs the ops, because addresses and decisions on the host cannot be traced. All ops
except `measure_tensors` treat their gradients as one segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import finite_number_of
from fastguard.functional.arguments import warn_of_zero
from fastguard.gradients.buckets import bucketize
from fastguard.gradients.elementwise import check_fill, check_real, clamp_, fill_nonfinite_
from fastguard.stages.apply import scale
from fastguard.stages.contract import Policy, Signals
from fastguard.stages.decide import decide as decide_stage
from fastguard.stages.decide import raise_if_nonfinite
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.measure import measure as measure_stage

_library = torch.library.Library("fastguard", "DEF")
# Reasons for the tags: an empty list has no device to dispatch on, and addresses may change between
# replays of a graph.
_KEY = "CompositeExplicitAutograd"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)


def define(
    schema: str,
    implementation: Callable[..., Any],
    shapes: Callable[..., Any] = lambda *_, **__: None,
) -> None:
    """Registers an op.

    Args:
        schema: The name and the signature of the op.
        implementation: The function that runs for all devices.
        shapes: The function that returns empty outputs, for tracing. Default: the op has no
            outputs.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, implementation, _KEY)
    torch.library.register_fake(f"fastguard::{name}", shapes, lib=_library)


def _measure(grads: list[Tensor], norm_type: float) -> tuple[Tensor, Tensor]:
    stats = measure_stage(bucketize(grads, norm_type=norm_type), norm_type)
    return stats.summary, stats.counts


def _measure_tensors(grads: list[Tensor], norm_type: float) -> tuple[Tensor, Tensor]:
    n = len(grads)
    buckets = bucketize(grads, segments=range(n), n_segments=n, norm_type=norm_type)
    stats = measure_stage(buckets, norm_type)
    return stats.summary, stats.counts


def _stats_shapes(grads: list[Tensor], n_segments: int) -> tuple[Tensor, Tensor]:
    device = grads[0].device if grads else torch.device("cpu")
    summary = torch.empty(4, n_segments, dtype=torch.float64, device=device)
    return summary, torch.empty(3, len(grads), dtype=torch.int64, device=device)


define(
    "measure(Tensor[] grads, float norm_type) -> (Tensor summary, Tensor counts)",
    _measure,
    lambda grads, norm_type: _stats_shapes(grads, 1),
)
define(
    "measure_tensors(Tensor[] grads, float norm_type) -> (Tensor summary, Tensor counts)",
    _measure_tensors,
    lambda grads, norm_type: _stats_shapes(grads, len(grads)),
)


def _check_limit(name: str, limit: Tensor) -> None:
    if limit.device.type != "cpu":  # reading the limit would wait for the device
        return
    if limit == 0:
        warn_of_zero(name)
    if not limit >= 0:
        raise ValueError(f"{name}={limit.item()} must be >= 0; use float('inf') for no limit")


def _decide(
    summary: Tensor,
    counts: Tensor,
    max_norm: Tensor,
    norm_type: float,
    nonfinite: str,
    names: list[str] | None,
    as_torch: bool = False,
    rooted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_limit("max_norm", max_norm)
    stats = GradStats(summary, counts, norm_type, names, rooted=rooted)
    if nonfinite == "raise":
        raise_if_nonfinite(stats, as_torch=as_torch)
    policy = Policy(max_norm.reshape(1), nonfinite)  # type: ignore[arg-type]
    verdict = decide_stage(stats, Signals.none(summary.device), None, policy)
    norm = verdict.torch_norm if nonfinite == "propagate" else verdict.total_norm
    # Compiled code may overwrite the outputs of an op. So the outputs must not share memory with
    # the arguments (the norm may be a view of `summary`) or with constants that verdicts share.
    return norm.clone(), verdict.multiplier, verdict.clean.clone()


def _decide_shapes(summary: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    device = summary.device
    return (
        torch.empty((), dtype=torch.float64, device=device),
        torch.empty(summary.shape[1], dtype=torch.float64, device=device),
        torch.empty((), dtype=torch.float32, device=device),
    )


define(
    "decide(Tensor summary, Tensor counts, Tensor max_norm, float norm_type, str nonfinite,"
    " str[]? names, bool as_torch=False, bool rooted=False)"
    " -> (Tensor total_norm, Tensor multiplier, Tensor clean)",
    _decide,
    _decide_shapes,
)


def _apply(grads: list[Tensor], multiplier: Tensor, clean: Tensor) -> None:
    scale(bucketize(grads), multiplier, clean)


define("apply(Tensor(a!)[] grads, Tensor multiplier, Tensor clean) -> ()", _apply)


def _clip_value(grads: list[Tensor], clip_value: Tensor) -> None:
    _check_limit("clip_value", clip_value)
    buckets = bucketize(grads)
    check_real(grads)
    clamp_(buckets, clip_value.item())


# `clip_value` is a CPU tensor
define("clip_value(Tensor(a!)[] grads, Tensor clip_value) -> ()", _clip_value)


def _sanitize(grads: list[Tensor], values: Tensor) -> None:
    buckets = bucketize(grads)
    nan, posinf, neginf = values.tolist()
    fill = {"nan": nan, "posinf": posinf, "neginf": neginf}
    for name, value in fill.items():
        finite_number_of(name, value, "the number replaces non-finite elements")
    check_fill(buckets, fill)
    fill_nonfinite_(buckets, fill)


# `values` is a CPU tensor with the replacements for NaN, +Inf and -Inf. Numbers would become
# constants of the compiled code.
define("sanitize(Tensor(a!)[] grads, Tensor values) -> ()", _sanitize)
