"""Stage 2, reduce: combines the stats and signals of all ranks.

One SUM collective over a float64 vector of shape `(4 S + 3 [+ 24] [+ W],)`: 248 bytes for one
segment, independent of the size of the model and the number of ranks.

    (4, S)   power sums, and numbers of NaN, +Inf and -Inf elements; each divided by the number of
             ranks that hold a copy
    1        number of loss scalers that found non-finite values, plus 2^-20 per rank whose
             non-finite values a lower loss scale does not fix
    2        number of ranks that hold non-finite values, and the sum of their rank numbers, which
             identifies the rank if there is only one
    12, 12   per loss the sum over ranks, and the number of ranks that passed it (only in steps of
             an optimizer); all losses beyond the first eleven share the last entry
    W        the watched quantities, in steps in which they are watched: `fastguard.guard.watch`

Further collectives: norms with p > 6 add a MAX of S numbers. On a CPU, a step with non-finite
values adds a MAX of 3 S numbers, so that all ranks agree on the counts even where copies differ.
Power sums outside the range of float64 add, on a CPU, a MAX and a SUM of S numbers, which combine
norms instead.

A collective yields the same bits on all ranks, and everything after it is computed from these bits
alone. In a single process there is nothing to do.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard.gradients.tensor_kinds import PLAIN, lasting, watched
from fastguard.gradients.transfer import current_stream_of, numbers_on
from fastguard.stages.contract import Signals
from fastguard.stages.formulas import LARGEST_POWER, root
from fastguard.stages.grad_stats import GradStats

if TYPE_CHECKING:
    from fastguard.ranks.loss_names import LossNames
    from fastguard.ranks.team import Sharing


ROUNDED_OFF = 1e-6
"""Tolerance for rounding weighted counts up. It is above the rounding error of weights such as 1/3,
and small enough that one element of a million copies still counts.
"""
INCURABLE = 2.0**-20
"""This number is added to the number of scalers for each rank with a fault that a lower scale does
not fix. It is exact in float64, and its sum over 10^6 ranks stays below 1.
"""


LEAST = 2.0**-1022
"""Smallest normal float64."""


def reduce(
    stats: GradStats, signals: Signals, sharing: Sharing | None = None, *, losses: bool = False
) -> tuple[GradStats, Signals]:
    """Combines the stats and signals of all ranks; the results are bitwise equal on every rank.

    Args:
        stats: The stats of this rank.
        signals: The signals of this rank.
        sharing: The ranks, and the weight of this rank's sums; None: there is a single process.
        losses: Whether the ranks exchange losses; must be the same on all ranks.

    Returns:
        Stats with the power sums and segment counts over all ranks (`counts` still describe the
        tensors of this rank), and signals with the losses of all ranks.
    """
    if sharing is None:
        return stats, signals
    p = stats.norm_type
    # on a CPU, reading needs no sync
    on_host = stats.kind is PLAIN and stats.summary.device.type == "cpu"
    unit = None
    if p == math.inf or p <= LARGEST_POWER:
        summary = _weighted(_as_power_sums(stats), sharing.weights, p)
    else:
        unit, summary = _relative_to_largest(stats, sharing)
    n_segments = summary.shape[1]
    parts = [summary.flatten(), *_flags(stats, signals, sharing.team.rank)]
    if losses:
        parts += _placed(signals, sharing)
    if signals.watched is not None:
        parts.append(signals.watched)
    vector = _exchanged(torch.cat(parts), sharing, dist.ReduceOp.SUM)
    total = vector[: 4 * n_segments].view(4, n_segments)
    if p == math.inf:
        total[0] = _exchanged(summary[0].clone(), sharing, dist.ReduceOp.MAX)
    elif unit is None and on_host and _exceeds_float64(total[0]):
        unit, summary = _relative_to_largest(stats, sharing)
        total[0] = _exchanged(summary[0].clone(), sharing, dist.ReduceOp.SUM)
    if unit is not None:
        total[0] = root(total[0], p) * unit
    watched_sums = None
    if signals.watched is not None:
        vector, watched_sums = vector.tensor_split([len(vector) - len(signals.watched)])
    flags = vector[4 * n_segments :]
    total[1:] = _whole_counts(total[1:], _largest_counts(stats, sharing, flags))
    joined = replace(
        signals,
        found_inf=(flags[0] >= 1.0).float(),
        scale_falls=flags[0].frac() == 0.0,
        bad_ranks=flags[1:3],
        watched=watched_sums,
    )
    if losses:
        joined = _with_losses(joined, flags[3:].view(2, -1), sharing.team.loss_names)
        if on_host:
            joined = _read_on_host(joined)
    return replace(stats, summary=total, rooted=unit is not None), joined


def _as_power_sums(stats: GradStats) -> Tensor:
    """Returns the summary with power sums, float64 `(4, S)`.

    A norm above 0 never gives a power sum of 0, so a sum of 0 over the ranks means a norm of 0.
    """
    if not stats.rooted:
        return stats.summary
    power_sums = torch.where(stats.summary[0] > 0, stats.power_sum.clamp(min=LEAST), 0.0)
    return torch.cat([power_sums[None], stats.summary[1:]])


def _exceeds_float64(power_sums: Tensor) -> bool:
    """Whether a power sum exceeds the range of float64, so that the ranks must sum norms instead.

    All ranks see the same sums. Called only on a CPU, since it would wait for a GPU. On a GPU, a
    norm that is too large becomes inf, which makes the step bad. A norm that is too small is below
    1e-48 and does not matter.
    """
    x = power_sums.numpy()
    return bool(((x == math.inf) | (x > 0) & (x < LEAST * 2.0**62)).any())


def _relative_to_largest(stats: GradStats, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Returns the largest norm of each segment over the ranks, and a summary relative to it.

    Takes one MAX collective.

    Returns:
        `(S,)`: the largest norms; `(4, S)`: the weighted summary, whose power sums are computed
        from norms divided by the largest norms.
    """
    n_classes = len(sharing.weights)
    norms = stats.segment_norms
    largest = _exchanged(norms.view(n_classes, -1).amax(0), sharing, dist.ReduceOp.MAX)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    beside = (norms / unit.repeat(n_classes)).pow(stats.norm_type)
    return unit, _weighted(
        torch.cat([beside[None], stats.summary[1:]]), sharing.weights, stats.norm_type
    )


def _weighted(summary: Tensor, weights: tuple[float, ...], norm_type: float) -> Tensor:
    """Returns the weighted sum over the classes of each segment, float64 `(4, S)`."""
    if weights == (1.0,):
        return summary
    by_class = summary.view(4, len(weights), -1)
    weight = _constant(weights, torch.float64, summary.device)
    joined = (by_class * weight[:, None]).sum(1)
    if norm_type == math.inf:  # a maximum needs no weights for copies
        joined[0] = by_class[0].amax(0)
    return joined


def _flags(stats: GradStats, signals: Signals, rank: int) -> tuple[Tensor, Tensor]:
    """Returns this rank's contributions to `found_inf` and `bad_ranks`; see the module.

    Returns:
        float64 `(1,)`: 1 if the scaler found non-finite values, plus 2^-20 if a lower scale does
        not fix them; float64 `(2,)`: 1 and the rank number if this rank holds non-finite values.
    """
    nonfinite = stats.segment_counts.sum() > 0
    bad = nonfinite if signals.local_nonfinite is None else signals.local_nonfinite > 0
    if len(signals.losses):
        bad = bad | ~signals.losses.isfinite().all()  # `isfinite` is False for NaN
    if signals.found_inf is None:
        overflow, incurable = torch.zeros_like(bad), nonfinite
    else:
        overflow = signals.found_inf > 0
        incurable = nonfinite | overflow
        if signals.scale_falls is not None:
            incurable = incurable & ~(overflow & signals.scale_falls)
    found = overflow.double().add(incurable, alpha=INCURABLE)
    number = torch.full((), float(rank), dtype=torch.float64, device=bad.device)
    return found.reshape(1), torch.stack([bad.double(), bad * number])


def _placed(signals: Signals, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Returns the losses of this rank at the positions that all ranks agree on.

    Returns:
        float64 `(12,)`: the losses; float64 `(12,)`: 1 where this rank has a loss, else 0.
    """
    from fastguard.ranks.loss_names import PLACES

    device = signals.losses.device
    sums, given = torch.zeros(2, PLACES, dtype=torch.float64, device=device)
    if signals.loss_names:
        places = sharing.team.loss_names.places(signals.loss_names)
        at = _constant(tuple(places), torch.int64, device)
        if len(set(places)) == len(places):
            sums[at] = signals.losses
        else:  # several losses share the last position
            sums.index_put_((at,), signals.losses, accumulate=True)
        given[at] = 1.0
    return sums, given


def _with_losses(signals: Signals, sums: Tensor, names: LossNames) -> Signals:
    """Returns the signals with the mean of each loss over the ranks that passed it; never waits.

    Args:
        signals: Signals without losses.
        sums: float64 `(2, 12)`: per position the sum of losses, and the number of ranks.
        names: The names of the positions.
    """
    total, n_ranks = sums
    means = total / n_ranks.clamp(min=1.0)  # a NaN of one rank makes the mean NaN
    return replace(signals, losses=means, loss_names=names, given=n_ranks > 0)


def _read_on_host(signals: Signals) -> Signals:
    """Returns the signals with only the losses that were passed, if the host knows them."""
    assert signals.given is not None
    places = signals.given.nonzero().squeeze(1)
    names = [signals.loss_names[i] for i in places.tolist()]
    return replace(signals, losses=signals.losses[places], loss_names=names, given=None)


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns constant numbers as a device tensor, cached per stream."""
    if watched():
        return numbers_on(values, device, dtype)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return numbers_on(values, device, dtype)  # not cached, since the graph owns this memory
    return _kept_constant(values, dtype, device, current_stream_of(device))


@functools.lru_cache(maxsize=256)
def _kept_constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    with lasting():
        return numbers_on(values, device, dtype)


def _largest_counts(stats: GradStats, sharing: Sharing, flags: Tensor) -> Tensor:
    """Returns the largest count of any rank, float64 `(3, S)`: a lower bound for the totals.

    If copies of a tensor differ, the mean of their counts can be below the count of one rank.
    If the host knows that there are non-finite elements, the ranks exchange the maximum: one MAX
    collective, only in bad steps. Otherwise, returns the counts of this rank.
    """
    held = stats.segment_counts
    if len(sharing.weights) > 1:
        held = held.view(3, len(sharing.weights), -1).sum(1)
    if stats.kind is PLAIN and sharing.team.meets_on_host and flags[1].item() > 0:
        held = _exchanged(held.clone(), sharing, dist.ReduceOp.MAX)
    return held


def _whole_counts(counts: Tensor, held: Tensor) -> Tensor:
    """Returns weighted counts rounded up to integers, and at least `held`."""
    return torch.maximum((counts - ROUNDED_OFF).ceil(), held)


def _exchanged(vector: Tensor, sharing: Sharing, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Returns the vector reduced over the team, on its own device."""
    home = vector.device
    vector = vector.to(sharing.team.device_for(home))
    dist.all_reduce(vector, op, group=sharing.team.group)
    return vector.to(home)
