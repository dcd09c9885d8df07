"""`"tensor_norms"`: the gradient norm of each tensor, and the fraction of elements that are 0.

I/O: two reads of the gradients (norms and zeros) in a watched step. With `clip_scope="tensor"` one
read, since every step computes these norms anyway. The norms are L2 norms of the finite elements,
for any `norm_type`, and are computed by the measure stage.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastguard.gradients.transfer import numbers_on
from fastguard.guard.watch.quantity import Reading, WatchedGradients, by_name
from fastguard.stages.contract import Known

ROUNDED = 1e-9
"""Shares up to this value are rounding errors from summing weights such as 1/3; a single zero
element gives a larger share.
"""


class TensorNorms:
    """Shows which layers have growing gradients, and which layers have none."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads sums of squares and numbers of nonzero elements, float64 `(2 T,)`."""
        values = torch.stack([step.power_sums(), step.nonzero().double()])
        at = step.with_gradient
        parameters, names = step.layout.parameters, step.layout.names
        n = len(parameters)
        if step.is_sharded:  # a parameter may have a gradient only on some ranks
            values *= numbers_on(step.weight_of_each(), step.device)
            at = list(range(n))
        # An element of a complex tensor is two numbers.
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            norms = [math.sqrt(numbers[i]) for i in at]
            shares = {names[i]: 1.0 - numbers[n + i] / sizes[i] for i in at if sizes[i]}
            some = {name: share for name, share in shares.items() if share > ROUNDED}
            return {
                "tensor_norms": by_name([names[i] for i in at], norms),
                "zero_share": by_name(list(some), some.values()),
            }

        return Reading(values.flatten(), results, sums_over_ranks=step.is_sharded)
