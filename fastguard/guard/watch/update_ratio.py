"""`"update_ratio"`: |update| / |weight| per tensor; about 1e-3 is typical of healthy training.

I/O in a watched step: a copy of the weights (kept in memory until the end of the step), then one
read of the copy and of the new weights. With shards, it is the ratio of this rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.transfer import moved
from fastguard.guard.watch.quantity import Reading, WatchedGradients, by_name
from fastguard.stages.contract import Known


class UpdateRatio:
    """Shows which layers change too much, and which do not change."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads the norms of the weights, then of their updates, float64 `(2 T,)`."""
        at = [i for i in step.with_gradient if step.layout.parameters[i].numel()]
        weights = step.weights(at)
        names = [step.layout.names[i] for i in at]
        before = [w.clone() for w in weights]
        norms = _norms(before, step.device)

        def after_update() -> Tensor:
            if before:
                torch._foreach_sub_(before, weights)
            return torch.cat([norms, _norms(before, step.device)])

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            if known.skipped:
                return {}
            n = len(names)
            pairs = zip(names, numbers[n:], numbers[:n], strict=True)
            ratios = {name: moved / norm for name, moved, norm in pairs if norm > 0}
            return {"update_ratio": by_name(list(ratios), ratios.values())}

        nothing = torch.cat([norms, torch.zeros_like(norms)])
        return Reading(nothing, results, after_update=after_update)


def _norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Returns the norms of the tensors, float64 `(T,)`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    wide = torch.float32 if all(t.itemsize <= 4 for t in tensors) else torch.float64
    if any(t.is_complex() for t in tensors):
        norms = [torch.linalg.vector_norm(t) for t in tensors]
    else:
        norms = torch._foreach_norm(tensors, 2.0, dtype=wide)
    return torch.stack([moved(x, device).double() for x in norms])
