"""`"update_ratio"`: |update| / |weight| per tensor, |weight|, and weights that are NaN or infinite.

A ratio of about 1e-3 is typical of healthy training. With `fastguard.optim`, the weights are its
float32 master weights, since a 16-bit weight does not change in most steps and then jumps.

I/O in a watched step: a copy of the weights (kept in memory until the end of the step), then two
reads of the new weights and one of the copy. For sharded parameters, the values are those of this
rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.buckets import bucketize
from fastguard.guard.watch.quantity import Reading, WatchedGradients, by_name
from fastguard.stages.contract import Known
from fastguard.stages.measure import measure


class UpdateRatio:
    """Shows which layers change too much, and which do not change."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads norms of weights, norms of updates, and counts of bad weights, float64 `(3 T,)`."""
        at = [i for i in step.with_gradient if step.layout.parameters[i].numel()]
        names = [step.layout.names[i] for i in at]
        before = [w.clone() for w in step.exact_weights(at)]
        norms, _ = _norms_and_counts(before, step.device)

        def after_update() -> Tensor:
            weights = step.exact_weights(at)
            _, bad = _norms_and_counts(weights, step.device)
            if before:
                torch._foreach_sub_(before, weights)
            updates, _ = _norms_and_counts(before, step.device)
            return torch.cat([norms, updates, bad])

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            if known.skipped:
                return {}
            n = len(names)
            norms, updates, bad = (numbers[k * n : (k + 1) * n] for k in range(3))
            triples = zip(names, updates, norms, strict=True)
            ratios = {name: moved / norm for name, moved, norm in triples if norm > 0}
            found = {name: int(k) for name, k in zip(names, bad, strict=True) if k}
            told: dict[str, Any] = {
                "update_ratio": by_name(list(ratios), ratios.values()),
                "weight_norm": by_name(names, norms),
            }
            if found:
                told["nonfinite_weights"] = by_name(list(found), found.values())
            return told

        return Reading(torch.cat([norms, norms * 0.0, norms * 0.0]), results, False, after_update)


def _norms_and_counts(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the norms of the finite elements and the numbers of others, float64 `(T,)` each."""
    if not tensors:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return empty, empty
    n = len(tensors)
    stats = measure(bucketize(tensors, segments=range(n), n_segments=n, device=device))
    return stats.segment_norms, stats.segment_counts.sum(0)
