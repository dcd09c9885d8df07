"""Stage 1, measure: computes `GradStats` in one pass over the gradients.

    GradStats.power_sum[s] = sum over the finite elements g of segment s of |g * inv_scale|^p

Where the power sum can exceed the range of float64 (for squares of float64 gradients, or tenth
powers of float32 gradients), the stage yields the norm instead. The norm is computed from the
elements divided by the largest element: see `holds_norms`.

I/O: reads every gradient once (N bytes) and writes O(S + T) numbers. Only a segment whose sum is
not finite is read again, to count NaN, +Inf and -Inf per tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard.errors.checked_numbers import number_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import UNSUPPORTED_ERRORS, refuse_wrapped
from fastguard.gradients.transfer import moved
from fastguard.stages import backend
from fastguard.stages.formulas import holds_norms, norm_of_norms, root
from fastguard.stages.grad_stats import GradStats


def measure(
    buckets: GradBuckets, norm_type: float = 2.0, inv_scale: Tensor | None = None
) -> GradStats:
    """Measures the gradients in one pass.

    Args:
        buckets: The gradients.
        norm_type: p > 0, or `inf`.
        inv_scale: float `()`: the factor by which a loss scaler unscales gradients. The stats
            describe the unscaled gradients; the gradients themselves do not change.

    Returns:
        The stats, on `buckets.device`. Waits for a GPU only to move its results to a CPU.
    """
    home = buckets.device
    rooted = any(holds_norms(bucket.dtype, norm_type) for bucket in buckets.buckets)
    summary = counts = None
    for bucket in buckets.buckets:
        try:
            part, found = backend.stages(bucket.device, bucket.kind).measure_bucket(
                bucket, buckets.n_measured, buckets.n_tensors, norm_type, inv_scale
            )
        except UNSUPPORTED_ERRORS as error:
            refuse_wrapped(bucket.grads, error)
            raise
        part, found = moved(part, home), moved(found, home)
        if rooted and not holds_norms(bucket.dtype, norm_type):
            norms = root(part.narrow(0, 0, 1), norm_type)
            part = torch.cat([norms, part.narrow(0, 1, 3)])
        summary = part if summary is None else _joined(summary, part, norm_type, rooted)
        counts = found if counts is None else counts + found
    if summary is None or counts is None:
        summary = torch.zeros(4, buckets.n_measured, dtype=torch.float64, device=home)
        counts = torch.zeros(3, buckets.n_tensors, dtype=torch.int64, device=home)
    return GradStats(
        summary, counts, norm_type, buckets.names, buckets.float64, rooted, buckets.kind
    )


def _joined(a: Tensor, b: Tensor, norm_type: float, rooted: bool) -> Tensor:
    if norm_type != math.inf and not rooted:
        return a + b
    one, other = a.narrow(0, 0, 1), b.narrow(0, 0, 1)
    if rooted:
        first = norm_of_norms(torch.cat([one, other]), norm_type).reshape(1, -1)
    else:
        first = torch.maximum(one, other)
    return torch.cat([first, a.narrow(0, 1, 3) + b.narrow(0, 1, 3)])


def norm_type_of(value: object) -> float:
    """Returns the p of a p-norm as a float.

    Raises:
        TypeError: `value` is not a number. As in torch, strings such as `"inf"` and `"2"` are
            accepted; a bool is not.
        ValueError: `value` is not in (0, inf], or exceeds the largest float.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass  # the check below raises an error
    p = number_of("norm_type", value, "use 2.0, 1.0 or float('inf')")
    if not p > 0.0:
        raise ValueError(
            f"norm_type={shown(value)} is not a norm; use a number > 0 or float('inf')"
        )
    return p
