"""`"tensor_norms"`: the norm of each tensor's gradient, and the share of its elements that are 0.

I/O: two reads of the gradients (norms and zeros) in a watched step. The norms are L2 norms of the
finite elements whatever `norm_type` is, and as accurate as the guard's own: `measure` takes them.
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
"""Less than one zero in any tensor; what sums over ranks with weights such as 1/3 round off."""


class TensorNorms:
    """Which layer grew, which one is dead."""

    def read(self, step: WatchedGradients) -> Reading:
        """float64 `(2, T)`: sums of squares, and how many elements are not 0."""
        at = step.with_gradient
        grads = step.gradients(at)
        n = len(at)
        buckets = bucketize(grads, segments=range(n), n_segments=n, device=step.device)
        power_sums = measure(buckets, 2.0, step.inv_scale).power_sum
        nonzero = _nonzero(grads, step.device)
        values = torch.stack([power_sums, nonzero])
        if step.is_sharded:  # a parameter may have a gradient on some ranks alone
            shares = step.weight_of_each()
            weights = numbers_on([shares[i] for i in at], step.device)
            everywhere = torch.zeros(2, len(shares), dtype=torch.float64, device=step.device)
            places = numbers_on(at, step.device, torch.int64)
            values = everywhere.index_copy_(1, places, values * weights)
            at = list(range(len(shares)))
        parameters = step.layout.parameters
        names = [step.layout.names[i] for i in at]
        sizes = [parameters[i].numel() for i in at]

        def tell(numbers: list[float], known: Known) -> dict[str, Any]:
            power_sums, nonzero = numbers[: len(names)], numbers[len(names) :]
            norms = map(math.sqrt, power_sums)
            of_each = zip(names, sizes, nonzero, strict=True)
            shares = {name: 1.0 - k / size for name, size, k in of_each if size}
            some = {name: share for name, share in shares.items() if share > ROUNDED}
            return {
                "tensor_norms": by_name(names, norms),
                "zero_share": by_name(list(some), some.values()),
            }

        return Reading(values.flatten(), tell, sums_over_ranks=step.is_sharded)


def _nonzero(grads: list[Tensor], device: torch.device) -> Tensor:
    """float64 `(T,)`."""
    if not grads:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu" and all(g.device.type == "cpu" for g in grads):
        return torch.tensor(list(map(_nonzero_on_host, grads)), dtype=torch.float64, device=device)
    return torch.stack([moved(torch.count_nonzero(g), device) for g in grads]).double()


def _nonzero_on_host(grad: Tensor) -> int:
    """How many elements are not 0. By numpy, which has no bfloat16: a quarter of torch's time."""
    if grad.dtype is torch.bfloat16:
        return int(torch.count_nonzero(grad))
    return grad.numel() - int(np.count_nonzero(grad.numpy(force=True) == 0))
