"""`"underflow"`: the fraction of non-zero gradients that would be subnormal in a narrower format.

    share[format] = |{g: 0 < |g| < smallest normal of the format}| / |{g: g != 0}|

Exponents are counted over a sample of at most `SAMPLE` elements, evenly spaced over the model, so
the cost of a watched step does not depend on the size of the model. For n sampled elements, the
standard error of a share is at most 1 / (2 sqrt(n)): 0.1 % for a full sample. Subnormal numbers
lose precision, and much smaller ones become 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.transfer import moved
from fastguard.guard.watch.quantity import Reading, WatchedGradients
from fastguard.stages.contract import Known
from fastguard.stages.cpu.vectors import flat

SAMPLE = 1 << 18
FORMATS = {
    "float16": -14,
    "bfloat16": -126,
    "float8_e4m3fn": -6,
    "float8_e5m2": -14,
}
"""Exponents of the smallest normal numbers (2 ** exponent) by format."""

BIAS = 127  # bias of the exponent field of float32
FIELDS = 256  # number of values of the exponent field


class Underflow:
    """Shows what gradients would lose in a narrower format, before switching to it."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads the number of sampled elements per exponent field, and of zeros, float64 `(257,)`.

        NaN and Inf are in the last field.
        """
        grads = [g for g in step.gradients(step.with_gradient) if g.numel()]
        total = sum(g.numel() for g in grads)
        stride = max(1, math.ceil(total / SAMPLE)) | 1  # odd: shares no factor with rows of 2**k
        parts = [moved(_sampled(g, stride), step.device) for g in grads]
        sample = torch.cat(parts) if parts else torch.zeros(0, device=step.device)
        if step.inv_scale is not None:
            sample = sample * step.inv_scale.float()
        fields = sample.view(torch.int32) >> 23 & 0xFF
        zero = sample == 0
        places = torch.where(zero, FIELDS, fields).long()
        counts = torch.zeros(FIELDS + 1, dtype=torch.int64, device=step.device)
        counts.index_add_(0, places, torch.ones_like(places))
        return Reading(counts.double(), _entries, sums_over_ranks=step.is_sharded)


def _sampled(grad: Tensor, stride: int) -> Tensor:
    """Returns every `stride`-th element as float32; float64 out of range becomes 0 or Inf."""
    real = torch.view_as_real(grad) if grad.is_complex() else grad
    return flat(real)[stride // 2 % real.numel() :: stride].float()


def _entries(numbers: list[float], known: Known) -> dict[str, Any]:
    counts = list(map(int, numbers))
    nonzero = sum(counts[: FIELDS - 1])
    if not nonzero:
        return {}
    told: dict[str, Any] = {
        name: sum(counts[: exponent + BIAS]) / nonzero for name, exponent in FORMATS.items()
    }
    # Field 0 holds the subnormal numbers of float32, all below 2**-126.
    told["exponents"] = {str(f - BIAS): c for f, c in enumerate(counts[: FIELDS - 1]) if c}
    return {"underflow": told}
