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

from torch import Tensor

from fastguard.guard.watch.quantity import Reading, WatchedGradients
from fastguard.stages.contract import Known
from fastguard.stages.watch import count_exponents

SAMPLE = 1 << 18
FORMATS = {
    "float16": -14,
    "bfloat16": -126,
    "float8_e4m3fn": -6,
    "float8_e5m2": -14,
}
"""Exponents of the smallest normal numbers (2 ** exponent) by format."""

BIAS = 127  # bias of the exponent field of float32
NONFINITE = 255  # exponent field of NaN and Inf


class Underflow:
    """Shows what gradients would lose in a narrower format, before switching to it."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads the number of sampled elements per exponent field, and of zeros, float64 `(257,)`.

        NaN and Inf are in the last field.
        """
        buckets = step.buckets.buckets
        total = sum(sum(b.sizes or map(Tensor.numel, b.grads)) for b in buckets)
        # an odd stride shares no factor with rows of length 2**k
        stride = max(1, math.ceil(total / SAMPLE)) | 1
        counts = count_exponents(step.buckets, stride, step.inv_scale)
        return Reading(counts.double(), _entries, sums_over_ranks=step.is_sharded)


def _entries(numbers: list[float], known: Known) -> dict[str, Any]:
    counts = list(map(int, numbers))
    nonzero = sum(counts[:NONFINITE])
    if not nonzero:
        return {}
    told: dict[str, Any] = {
        name: sum(counts[: exponent + BIAS]) / nonzero for name, exponent in FORMATS.items()
    }
    # Field 0 holds the subnormal numbers of float32, all below 2**-126.
    told["exponents"] = {str(f - BIAS): c for f, c in enumerate(counts[:NONFINITE]) if c}
    return {"underflow": told}
