"""`"tensor_norms"`: the gradient norm of each tensor, and the fraction of elements that are 0.

I/O: two reads of the gradients (norms and zeros) in a watched step. The norms are L2 norms of the
finite elements, for any `norm_type`, and are computed by the measure stage.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import bucketize
from fastguard.gradients.transfer import moved, numbers_on
from fastguard.guard.watch.quantity import Reading, WatchedGradients, by_name
from fastguard.stages.contract import Known
from fastguard.stages.measure import measure

ROUNDED = 1e-9
"""Shares up to this are rounding errors of sums with weights such as 1/3; one zero is more."""


class TensorNorms:
    """Shows which layers have growing gradients, and which have none."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads sums of squares and numbers of non-zero elements, float64 `(2 T,)`."""
        at = step.with_gradient
        grads = step.gradients(at)
        n = len(at)
        buckets = bucketize(grads, segments=range(n), n_segments=n, device=step.device)
        power_sums = measure(buckets, 2.0, step.inv_scale).power_sum
        nonzero = _nonzero(grads, step.device)
        values = torch.stack([power_sums, nonzero])
        if step.is_sharded:  # a parameter may have a gradient only on some ranks
            shares = step.weight_of_each()
            weights = numbers_on([shares[i] for i in at], step.device)
            everywhere = torch.zeros(2, len(shares), dtype=torch.float64, device=step.device)
            places = numbers_on(at, step.device, torch.int64)
            values = everywhere.index_copy_(1, places, values * weights)
            at = list(range(len(shares)))
        parameters = step.layout.parameters
        names = [step.layout.names[i] for i in at]
        sizes = [parameters[i].numel() for i in at]

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            power_sums, nonzero = numbers[: len(names)], numbers[len(names) :]
            norms = map(math.sqrt, power_sums)
            of_each = zip(names, sizes, nonzero, strict=True)
            shares = {name: 1.0 - k / size for name, size, k in of_each if size}
            some = {name: share for name, share in shares.items() if share > ROUNDED}
            return {
                "tensor_norms": by_name(names, norms),
                "zero_share": by_name(list(some), some.values()),
            }

        return Reading(values.flatten(), results, sums_over_ranks=step.is_sharded)


def _nonzero(grads: list[Tensor], device: torch.device) -> Tensor:
    """Returns the numbers of non-zero elements, float64 `(T,)`."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu" and all(g.device.type == "cpu" for g in grads):
        return torch.tensor(list(map(_nonzero_on_host, grads)), dtype=torch.float64, device=device)
    return torch.stack([moved(torch.count_nonzero(g), device) for g in grads]).double()


def _nonzero_on_host(grad: Tensor) -> int:
    """Returns the number of non-zero elements.

    numpy takes a quarter of torch's time, but has no bfloat16.
    """
    if grad.dtype is torch.bfloat16:
        return int(torch.count_nonzero(grad))
    return grad.numel() - int(np.count_nonzero(grad.numpy(force=True) == 0))
