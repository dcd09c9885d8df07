"""Stage 2, reduce: every rank comes to know what all ranks know together.

One SUM collective over one small float64 vector, `(4 S + 3 [+ 24] [+ W],)`: 248 bytes for one
segment, whatever the size of the model and the number of ranks (norms of p > 6 add one MAX over S;
on a CPU a bad step adds one over 3 S, so that counts of copies that differ agree, and power sums
that float64 cannot hold add a MAX and a SUM over S, so that norms are summed instead):

    (4, S)   power sums, and how many elements are NaN, +Inf, -Inf, each weighted by 1 / copies
    1        how many loss scalers found something non-finite, and 2^-20 for each rank that holds
             what no lower loss scale will cure
    2        how many ranks hold something non-finite, and the sum of their numbers: one rank's name
    12, 12   of each loss the sum over ranks, and how many ranks gave it (optimizers only); the
             last is for all losses that came when the other places were taken
    W        what watched quantities add up, in the steps that are watched: `fastguard.guard.watch`

A collective gives all ranks the same bits, and everything after it is computed from them alone.
Without a team, in one process, there is nothing to do.
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
from fastguard.stages.contract import GradStats, Signals
from fastguard.stages.formulas import LARGEST_POWER, root

if TYPE_CHECKING:
    from fastguard.ranks.loss_names import LossNames
    from fastguard.ranks.team import Sharing


ROUNDED_OFF = 1e-6
"""More than what sums of a weight such as 1/3 round off, less than one copy of a million counts."""
INCURABLE = 2.0**-20
"""In the place of the scalers: exact beside their number, and below 1 on a million ranks."""


LEAST = 2.0**-1022
"""Smallest normal float64."""


def reduce(
    stats: GradStats, signals: Signals, sharing: Sharing | None = None, *, losses: bool = False
) -> tuple[GradStats, Signals]:
    """Joins the stats and signals of all ranks; the same result on every rank, bit for bit.

    Args:
        stats: What this rank measured.
        signals: What this rank knows.
        sharing: How the sums of this rank enter those of all; None: this process holds everything.
        losses: Whether the ranks exchange losses; all of them must say the same.

    Returns:
        Stats whose power sums and segment counts are those of all ranks (`counts` stay those of
        this rank's tensors), and signals with the losses of all.
    """
    if sharing is None:
        return stats, signals
    p = stats.norm_type
    on_host = stats.kind is PLAIN and stats.summary.device.type == "cpu"  # free to be read
    unit = None
    if p == math.inf or p <= LARGEST_POWER:
        summary = _weighted(_as_power_sums(stats), sharing.weights, p)
    else:
        unit, summary = _beside_the_largest(stats, sharing)
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
    elif unit is None and on_host and _left_float64(total[0]):
        unit, summary = _beside_the_largest(stats, sharing)
        total[0] = _exchanged(summary[0].clone(), sharing, dist.ReduceOp.SUM)
    if unit is not None:
        total[0] = root(total[0], p) * unit
    watched_sums = None
    if signals.watched is not None:
        vector, watched_sums = vector.tensor_split([len(vector) - len(signals.watched)])
    flags = vector[4 * n_segments :]
    total[1:] = _whole_counts(total[1:], _held(stats, sharing, flags))
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
    """float64 `(4, S)`: the summary with power sums; never 0 for a norm above 0, so that a sum of 0
    over ranks says that there is nothing.
    """
    if not stats.rooted:
        return stats.summary
    power_sums = torch.where(stats.summary[0] > 0, stats.power_sum.clamp(min=LEAST), 0.0)
    return torch.cat([power_sums[None], stats.summary[1:]])


def _left_float64(power_sums: Tensor) -> bool:
    """Whether the ranks, which all see these sums, must add up something else: float64 cannot hold
    one of them.

    Only on a CPU: a GPU would have to wait to know. There the norm becomes inf, so that the step is
    bad, or is too small to matter, 1e-48 at the most.
    """
    x = power_sums.numpy()
    return bool(((x == math.inf) | (x > 0) & (x < LEAST * 2.0**62)).any())


def _beside_the_largest(stats: GradStats, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """The largest norm that a rank has of each segment, `(S,)`, after one MAX collective; and the
    summary with power sums of norms divided by it, each weighted.
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
    """float64 `(4, S)`: the classes of each segment added up, each with its weight."""
    if weights == (1.0,):
        return summary
    by_class = summary.view(4, len(weights), -1)
    weight = _constant(weights, torch.float64, summary.device)
    joined = (by_class * weight[:, None]).sum(1)
    if norm_type == math.inf:  # the largest of all, however many ranks hold it
        joined[0] = by_class[0].amax(0)
    return joined


def _flags(stats: GradStats, signals: Signals, rank: int) -> tuple[Tensor, Tensor]:
    """float64 `(1,)` and `(2,)`.

    What the scaler of this rank found, and whether a lower scale cures it; whether this rank holds
    something non-finite, and its number.
    """
    nonfinite = stats.segment_counts.sum() > 0
    bad = nonfinite if signals.born_here is None else signals.born_here > 0
    if len(signals.losses):
        bad = bad | ~signals.losses.isfinite().all()  # NaN is not finite
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
    """float64 `(12,)` twice: the losses of this rank in the places that all ranks agree on, and 1
    where it has one.
    """
    from fastguard.ranks.loss_names import PLACES

    device = signals.losses.device
    sums, given = torch.zeros(2, PLACES, dtype=torch.float64, device=device)
    if signals.loss_names:
        places = sharing.team.loss_names.places(signals.loss_names)
        at = _constant(tuple(places), torch.int64, device)
        if len(set(places)) == len(places):
            sums[at] = signals.losses
        else:  # several share the last place
            sums.index_put_((at,), signals.losses, accumulate=True)
        given[at] = 1.0
    return sums, given


def _with_losses(signals: Signals, sums: Tensor, names: LossNames) -> Signals:
    """The signals with the mean of each loss over the ranks that gave it; nothing waits.

    Args:
        signals: Without losses.
        sums: float64 `(2, 12)`: of each place the sum of losses, and how many ranks gave one.
        names: The names of the places.
    """
    total, n_ranks = sums
    means = total / n_ranks.clamp(min=1.0)  # NaN stays NaN: no rank's loss hides another's
    return replace(signals, losses=means, loss_names=names, given=n_ranks > 0)


def _read_on_host(signals: Signals) -> Signals:
    """The same with the given losses alone: on a CPU it is known at once which they are."""
    assert signals.given is not None
    places = signals.given.nonzero().squeeze(1)
    names = [signals.loss_names[i] for i in places.tolist()]
    return replace(signals, losses=signals.losses[places], loss_names=names, given=None)


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are the same step after step, on the device once for each stream."""
    if watched():
        return numbers_on(values, device, dtype)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return numbers_on(values, device, dtype)  # a part of the graph: not there before it runs
    return _kept_constant(values, dtype, device, current_stream_of(device))


@functools.lru_cache(maxsize=256)
def _kept_constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    with lasting():
        return numbers_on(values, device, dtype)


def _held(stats: GradStats, sharing: Sharing, flags: Tensor) -> Tensor:
    """float64 `(3, S)`: the most that any rank holds of each count.

    Copies of a tensor may differ, and the mean of their counts is then less than what one of them
    holds and is told to hold. Where the host knows that there is something to count, the ranks
    exchange it: one MAX, on bad steps alone. Where it does not, it is what this rank holds.
    """
    held = stats.segment_counts
    if len(sharing.weights) > 1:
        held = held.view(3, len(sharing.weights), -1).sum(1)
    if stats.kind is PLAIN and sharing.team.meets_on_host and flags[1].item() > 0:
        held = _exchanged(held.clone(), sharing, dist.ReduceOp.MAX)
    return held


def _whole_counts(counts: Tensor, held: Tensor) -> Tensor:
    """Weighted counts as whole numbers, a part of one as one; no less than what a rank holds."""
    return torch.maximum((counts - ROUNDED_OFF).ceil(), held)


def _exchanged(vector: Tensor, sharing: Sharing, op: dist.ReduceOp.RedOpType) -> Tensor:
    """The vector reduced over the team, where it was."""
    home = vector.device
    vector = vector.to(sharing.team.device_for(home))
    dist.all_reduce(vector, op, group=sharing.team.group)
    return vector.to(home)
