"""`"update_ratio"`: |update| / |weight| per tensor, |weight|, and weights that are NaN or infinite.

A ratio of about 1e-3 is typical of healthy training. The optimizers of `fastguard.optim` compute
all three values within their update. They use their float32 master weights if they have any, since
a 16-bit weight does not change in most steps and then jumps. For all other optimizers, the weights
are copied.

I/O in a watched step: none beyond the update with `fastguard.optim`. With other optimizers, a copy
of the weights (kept until the end of the step), then two reads of the new weights and one of the
copy. For sharded parameters, the values describe this rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard.gradients.buckets import bucketize
from fastguard.gradients.transfer import moved
from fastguard.guard.watch.quantity import Reading, WatchedGradients, by_name
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.optim.statistics import UpdateStatistics
from fastguard.stages.contract import Known
from fastguard.stages.measure import measure


class UpdateRatio:
    """Shows which layers change too much, and which layers do not change."""

    def read(self, step: WatchedGradients) -> Reading:
        """Reads norms of weights, norms of updates, and counts of bad weights, float64 `(3 T,)`."""
        at = [i for i in step.with_gradient if step.layout.parameters[i].numel()]
        if step.optimizer is not None:
            return _in_update(step, at, step.optimizer)
        names = [step.layout.names[i] for i in at]
        before = [w.clone() for w in step.weights(at)]
        norms, _ = _norms_and_counts(before, step.device)

        def after_update() -> Tensor:
            weights = step.weights(at)
            _, bad = _norms_and_counts(weights, step.device)
            if before:
                torch._foreach_sub_(before, weights)
            updates, _ = _norms_and_counts(before, step.device)
            return torch.cat([norms, updates, bad])

        def results(numbers: list[float], known: Known) -> dict[str, Any]:
            return {} if known.skipped else _entries(names, numbers)

        values = torch.cat([norms, norms * 0.0, norms * 0.0])
        return Reading(values, results, after_update=after_update)


def _in_update(step: WatchedGradients, at: list[int], optimizer: FusedOptimizer) -> Reading:
    """Lets the optimizer compute the same values, in the order in which it updates parameters."""
    statistics = UpdateStatistics()
    nothing = torch.zeros(0, dtype=torch.float64, device=step.device)

    def after_update() -> Tensor:
        columns = (statistics.weight_norms, statistics.update_norms, statistics.nonfinite_counts)
        return torch.cat([nothing, *(moved(x.double(), step.device) for x in columns)])

    def results(numbers: list[float], known: Known) -> dict[str, Any]:
        if known.skipped:
            return {}
        n = len(statistics.parameters)
        place = {id(p): k for k, p in enumerate(statistics.parameters)}
        updated = [i for i in at if id(step.layout.parameters[i]) in place]
        order = [place[id(step.layout.parameters[i])] for i in updated]
        in_order = [numbers[column * n + k] for column in range(3) for k in order]
        return _entries([step.layout.names[i] for i in updated], in_order)

    during_update = optimizer.collecting_statistics(statistics)
    return Reading(nothing, results, during_update=during_update, after_update=after_update)


def _entries(names: list[str], numbers: list[float]) -> dict[str, Any]:
    """Returns the entries of the record.

    Args:
        names: Names of T tensors.
        numbers: The norms of their weights, the norms of their updates, and the counts, `(3 T,)`.
    """
    n = len(names)
    norms, updates, bad = (numbers[k * n : (k + 1) * n] for k in range(3))
    triples = zip(names, updates, norms, strict=True)
    ratios = {name: update / norm for name, update, norm in triples if norm > 0}
    found = {name: int(k) for name, k in zip(names, bad, strict=True) if k}
    told: dict[str, Any] = {
        "update_ratio": by_name(list(ratios), ratios.values()),
        "weight_norm": by_name(names, norms),
    }
    if found:
        told["nonfinite_weights"] = by_name(list(found), found.values())
    return told


def _norms_and_counts(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the norms of the finite elements and the numbers of others, float64 `(T,)` each."""
    if not tensors:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return empty, empty
    n = len(tensors)
    stats = measure(bucketize(tensors, segments=range(n), n_segments=n, device=device))
    return stats.segment_norms, stats.segment_counts.sum(0)
