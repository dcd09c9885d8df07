"""The measure stage on a CPU; the sums are computed in `stages.cpu.power_sums`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.stages.cpu.power_sums import power_sums
from fastguard.stages.formulas import (
    unscaled,
)

CPU = torch.device("cpu")


def measure_bucket(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes power sums and counts: see `fastguard.stages.reference.measure_bucket`."""
    sums, bad = power_sums(bucket, n_segments, norm_type)
    bucket.memo.nonfinite = list(bad)
    rows = np.zeros((4, n_segments))  # numpy takes half of the time of torch
    rows[0] = sums
    summary = torch.from_numpy(rows)
    counts = torch.from_numpy(np.zeros((3, n_tensors), np.int64))
    for position, found in bad.items():
        counts[:, bucket.tensor_ids[position]] = torch.tensor(found, device=CPU)
    for position, found in bad.items():
        summary[1:, bucket.segment_ids[position]] += torch.tensor(found, device=CPU)
    return unscaled(summary, bucket.dtype, norm_type, inv_scale), counts
