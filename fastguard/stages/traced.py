"""The stages for gradients without values, as during tracing: one custom op per stage.

When the traced graph runs with values, the ops run the actual stages. An op handles the gradients
of one segment. With several segments, `apply` calls one op per segment, and `measure_bucket`
combines results per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.stages.formulas import holds_norms, unscaled
from fastguard.stages.reference import decide as decide
from fastguard.stages.reference import joined
from fastguard.stages.reference import pack as pack
from fastguard.stages.reference_units import clip_units as clip_units
from fastguard.stages.reference_watch import count_exponents as count_exponents
from fastguard.stages.reference_watch import read_bits as read_bits


def measure_bucket(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes power sums and counts: see `fastguard.stages.reference.measure_bucket`."""
    ops = torch.ops.fastguard
    if n_segments == 1:
        summary, counts = ops.measure(bucket.grads, norm_type)
    else:
        each, counts = ops.measure_tensors(bucket.grads, norm_type)
        summary = _by_segment(each, bucket, n_segments, norm_type)
    summary = unscaled(summary, bucket.dtype, norm_type, inv_scale)
    return summary, _placed(counts, bucket.tensor_ids, n_tensors)


def _by_segment(each: Tensor, bucket: GradBucket, n: int, norm_type: float) -> Tensor:
    """Combines a summary per tensor, float64 `(4, T)`, into one per segment, `(4, S)`."""
    rooted = holds_norms(bucket.dtype, norm_type)
    members: list[list[Tensor]] = [[] for _ in range(n)]
    for column, segment in zip(each.unbind(1), bucket.segment_ids, strict=True):
        members[segment].append(column)
    columns = []
    for own in members:
        first = joined([column.select(0, 0) for column in own], each, norm_type, rooted)
        counts = [column.narrow(0, 1, 3) for column in own]
        columns.append(torch.cat([first, torch.stack([*counts, each.new_zeros(3)]).sum(0)]))
    return torch.stack(columns, 1)


def _placed(counts: Tensor, ids: Sequence[int], n: int) -> Tensor:
    """Returns `(3, n)` with the columns of `counts` at the positions `ids`, else zeros."""
    if len(ids) == n:
        return counts
    columns = [counts.new_zeros(3)] * n
    for i, column in zip(ids, counts.unbind(1), strict=True):
        columns[i] = column
    return torch.stack(columns, 1)


def apply(
    bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
) -> None:
    """Scales and cleans one bucket in place: see `fastguard.stages.reference.apply`."""
    members: dict[int, list[Tensor]] = {}
    for grad, segment in zip(bucket.grads, bucket.segment_ids, strict=True):
        members.setdefault(segment, []).append(grad)
    for segment, grads in members.items():
        torch.ops.fastguard.apply(grads, multiplier.narrow(0, segment, 1), clean)
