"""The measure stage on a CPU: power sums and counts, limited by memory bandwidth.

Formula: `power_sum = sum(|x|^p)`. For p = 2 and dtypes below float64, `l2_sums` computes it; all
other cases (other p, float64 gradients, many segments of one small tensor each) sum in float64.

The sum also shows whether all elements are finite. If it is NaN or Inf, an exact pass in float64
follows, which counts NaN, +Inf and -Inf and sums the finite elements. The same pass replaces
float32 sums that are infinite because of an overflow, or so small (below `n_elements * 2**-126 *
1e9`) that squares may have been lost to underflow. If sums can exceed the range of float64 (see
`fastguard.stages.formulas.holds_norms`), the result is the norm, and the exact pass divides the
elements by the largest one first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.vectors import GRAIN, buffer, few, gathered, in_pieces, sum_of_squares
from fastguard.stages.cpu import l2_sums
from fastguard.stages.formulas import holds_norms, unscaled

PIECE = 2**18  # elements that are converted to float64 at a time: 2 MB
SMALL = 2**12  # up to this number of elements, single-tensor segments are summed together
FEW = 8  # fewer single-tensor segments are summed one by one
TINY_SQUARE = 2.0**-126  # smallest normal float32; smaller squares may be flushed to zero
# above the limits in `_trustworthy` for any tensor that fits in memory
PLAINLY_TRUSTWORTHY = 1e-12
# 2**62 times 2**-1022, the smallest normal float64, below which powers may be flushed to zero
TINY_POWER = 2.0**-960
CPU = torch.device("cpu")

Counts = tuple[int, int, int]
T = TypeVar("T")


@dataclass(slots=True)
class Part:
    """One segment of a bucket.

    Attributes:
        segment: The number of the segment.
        positions: Positions of its gradients in the bucket.
        tensors: The gradients of the segment, or the runs that hold these gradients.
        sizes: Number of elements of each tensor, if known.
        pieces: The tensors prepared for `l2_sums.power_sum`; None: not prepared yet.
    """

    segment: int
    positions: Sequence[int]
    tensors: Sequence[Tensor]
    sizes: Sequence[int] | None = None
    pieces: l2_sums.Pieces | None = None

    def l2_power_sum(self) -> float:
        """Returns the sum of squares: see `l2_sums.power_sum`."""
        if self.pieces is None:
            self.pieces = l2_sums.Pieces.of(self.tensors, self.sizes)
        return l2_sums.power_sum(self.pieces)


def measure_bucket(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes power sums and counts: see `fastguard.stages.reference.measure_bucket`."""
    sums, bad = power_sums(bucket, n_segments, norm_type)
    bucket.memo.nonfinite = list(bad)
    rows = np.zeros((4, n_segments))  # numpy takes half as long as torch
    rows[0] = sums
    summary = torch.from_numpy(rows)
    counts = torch.from_numpy(np.zeros((3, n_tensors), np.int64))
    for position, found in bad.items():
        counts[:, bucket.tensor_ids[position]] = torch.tensor(found, device=CPU)
    for position, found in bad.items():
        summary[1:, bucket.segment_ids[position]] += torch.tensor(found, device=CPU)
    return unscaled(summary, bucket.dtype, norm_type, inv_scale), counts


def power_sums(
    bucket: GradBucket, n_segments: int, norm_type: float
) -> tuple[list[float], dict[int, Counts]]:
    """Computes power sums, or norms, of finite elements per segment, and counts NaN and Inf.

    Args:
        bucket: CPU gradients of one dtype.
        n_segments: S.
        norm_type: p > 0; `inf` gives the maximum instead of the power sum.

    Returns:
        S power sums (norms if `holds_norms` is true for this dtype), and the dict `{position in
        bucket.grads: (nan, posinf, neginf)}` with the tensors that hold non-finite elements.
    """
    sums = [0.0] * n_segments
    bad: dict[int, Counts] = {}
    parts = _parts(bucket)
    roots = holds_norms(bucket.dtype, norm_type)
    known = _sums_of_small_segments(parts, norm_type) if len(parts) >= FEW else {}
    for part in parts:
        total = known.get(part.segment)
        if total is None:
            total = _clean_sum(part, bucket.dtype, norm_type)
        # a fast check without a function call, False for NaN
        usual = PLAINLY_TRUSTWORTHY < total < math.inf
        if usual or _trustworthy(total, bucket, part, norm_type, part.segment in known):
            sums[part.segment] = _root(total, norm_type) if roots else total
            continue
        exact = _exact_norm if roots else _exact
        sums[part.segment], found = exact(bucket, part.positions, norm_type)
        bad.update(found)
    return sums, bad


def _parts(bucket: GradBucket) -> list[Part]:
    """Returns the segments of a bucket. If it has runs, caches them until a run's memory moves.

    Memory moves when a tensor is shared with another process; numpy arrays of the old memory would
    then be stale.
    """
    if bucket.runs is None:
        return list(_by_segment(bucket))
    places = [run.flat.data_ptr() for run in bucket.runs]
    kept_places, parts = bucket.memo.parts or (None, [])
    if kept_places != places:
        parts = list(_by_segment(bucket))
        bucket.memo.parts = places, parts
    return parts


def _by_segment(bucket: GradBucket) -> Iterator[Part]:
    runs = None if bucket.runs is None else by_number((r.segment, r.flat) for r in bucket.runs)
    if bucket.segment is not None:
        positions = range(len(bucket.grads))
        if runs is None:
            yield Part(bucket.segment, positions, bucket.grads, bucket.sizes)
        else:
            yield Part(bucket.segment, positions, runs[bucket.segment])
        return
    segments = bucket.segment_ids
    # one segment per tensor: takes half the time
    if runs is None and len(set(segments)) == len(segments):
        for i, (segment, grad) in enumerate(zip(segments, bucket.grads, strict=True)):
            yield Part(segment, (i,), (grad,))
        return
    for segment, positions in by_number(zip(segments, count())).items():
        tensors = [bucket.grads[i] for i in positions] if runs is None else runs[segment]
        yield Part(segment, positions, tensors)


def by_number(pairs: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    """Groups the second entries of pairs by the first, such as gradients by segment."""
    members: dict[int, list[T]] = {}
    for segment, member in pairs:
        members.setdefault(segment, []).append(member)
    return members


def _sums_of_small_segments(parts: Sequence[Part], norm_type: float) -> dict[int, float]:
    """Returns the float64 power sums of segments that consist of one small tensor, by segment.

    Sums many segments at a time, since summing them one by one costs 9 µs per segment. With one
    segment per tensor, most segments of a model with many layers are small tensors.
    """
    single = [part for part in parts if len(part.tensors) == 1]
    numel = list(map(Tensor.numel, [part.tensors[0] for part in single]))
    small = [part for part, n in zip(single, numel, strict=True) if 0 < n <= SMALL]
    if len(small) < FEW:
        return {}
    add = np.maximum if norm_type == math.inf else np.add
    tensors = [part.tensors[0] for part in small]
    sizes = [n for n in numel if 0 < n <= SMALL]
    # with new memory, this would take twice the time
    wide = buffer("grain", GRAIN, (GRAIN,), torch.float64)
    sums: list[float] = []
    for values, start, stop in gathered(tensors, GRAIN, sizes):
        x = wide[: values.numel()].copy_(values)
        powers = x.square_() if norm_type == 2.0 else _powers(x, norm_type)
        starts = list(accumulate(sizes[start : stop - 1], initial=0))
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for Inf and NaN
            sums += add.reduceat(powers.numpy(), starts).tolist()
    return dict(zip([part.segment for part in small], sums, strict=True))


def _clean_sum(part: Part, dtype: torch.dtype, norm_type: float) -> float:
    """Returns the power sum; NaN or Inf if an element is not finite, or if float32 overflows."""
    if norm_type == math.inf:
        pieces = in_pieces(_not_empty(part.tensors))
        return torch.stack(torch._foreach_norm(pieces, math.inf)).max().item()
    if norm_type == 2.0 and dtype is not torch.float64:
        return part.l2_power_sum()
    return sum(_float64_power_sum(x, norm_type) for x, _ in _float64_pieces(part.tensors))


def _not_empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the non-empty tensors, or a zero if there are none.

    torch raises an error for the inf-norm of an empty tensor; here, this norm is 0.
    """
    return [t for t in tensors if t.numel()] or [torch.zeros(1, device="cpu")]


def _trustworthy(
    total: float, bucket: GradBucket, part: Part, norm_type: float, in_float64: bool
) -> bool:
    """Whether a sum is finite, and so large that powers lost to underflow do not matter."""
    if not math.isfinite(total):
        return False
    if total > PLAINLY_TRUSTWORTHY or norm_type == math.inf:
        return True
    if holds_norms(bucket.dtype, norm_type):
        least = TINY_POWER
    elif norm_type == 2.0 and not in_float64:
        least = TINY_SQUARE * 1e9
    else:
        return True
    return total > sum(bucket.grads[i].numel() for i in part.positions) * least


def _root(power_sum: float, norm_type: float) -> float:
    """Returns the norm; inf if it exceeds float64, which can happen for p < 1."""
    if norm_type == 2.0:
        return math.sqrt(power_sum)
    try:
        return power_sum ** (1.0 / norm_type)
    except OverflowError:
        return math.inf


# The exact pass in float64.


def _float64_pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, range]]:
    """Yields float64 vectors of bounded length that together hold all tensors.

    Yields:
        The values, and the positions of the tensors that they belong to, in order.
    """
    sizes = list(map(Tensor.numel, tensors))
    limit = GRAIN if few(sizes) else PIECE
    for values, start, stop in gathered(tensors, limit, sizes):
        yield values.double(), range(start, stop)


def _powers(x: Tensor, norm_type: float) -> Tensor:
    """Returns `|x|^p`, or `|x|` for the inf-norm, as a new tensor."""
    if norm_type == 2.0:
        return x.square()
    magnitude = x.abs()
    return magnitude if norm_type in (1.0, math.inf) else magnitude.pow_(norm_type)


def _float64_power_sum(x: Tensor, norm_type: float) -> float:
    if norm_type == 2.0:
        if len(x) > GRAIN:
            return torch.dot(x, x).item()  # needs no temporary tensor for the squares
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for Inf and NaN
            return sum_of_squares(x.numpy(force=True))
    powers = _powers(x, norm_type)
    return (powers.max() if norm_type == math.inf else powers.sum()).item()


def _exact(
    bucket: GradBucket, positions: Sequence[int], norm_type: float
) -> tuple[float, dict[int, Counts]]:
    """Returns the power sum of finite elements, and the counts of NaN and Inf by position."""
    parts: list[float] = []
    bad: dict[int, Counts] = {}
    for x, owners in _float64_pieces([bucket.grads[i] for i in positions]):
        part = _float64_power_sum(x, norm_type)
        if not math.isfinite(part):
            finite = x.isfinite()
            if not finite.all():
                mine = [positions[k] for k in owners]
                _count(x, finite, mine, [bucket.grads[i].numel() for i in mine], bad)
                part = _float64_power_sum(torch.where(finite, x, 0.0), norm_type)
        parts.append(part)
    return (max(parts, default=0.0) if norm_type == math.inf else sum(parts)), bad


def _exact_norm(
    bucket: GradBucket, positions: Sequence[int], norm_type: float
) -> tuple[float, dict[int, Counts]]:
    """Returns the norm of finite elements, and the counts of NaN and Inf by position.

    Divides by the largest element first, so that powers stay in the range of float64.
    """
    largest, bad = _exact(bucket, positions, math.inf)
    if largest == 0.0:
        return 0.0, bad
    grads = [bucket.grads[i] for i in positions]
    pieces = (x.div(largest) for x, _ in _float64_pieces(grads))
    if bad:
        pieces = (torch.where(x.isfinite(), x, 0.0) for x in pieces)
    total = sum(_float64_power_sum(x, norm_type) for x in pieces)
    return _root(total, norm_type) * largest, bad


def _count(
    x: Tensor,
    finite: Tensor,
    positions: Sequence[int],
    sizes: Sequence[int],
    bad: dict[int, Counts],
) -> None:
    """Adds the non-finite elements of `x` to the counts in `bad`.

    Args:
        x: Elements of the tensors at `positions`, or a piece of a single tensor.
        finite: Which elements of `x` are finite.
        positions: Positions of the tensors in the bucket.
        sizes: Number of elements of each tensor.
        bad: Counts by position, updated.
    """
    where = (~finite).nonzero().squeeze(1)
    values = x[where].numpy()
    owner = np.cumsum(sizes).searchsorted(where.numpy(), side="right")
    for k in np.unique(owner).tolist():
        mine = values[owner == k]
        nan, posinf, neginf = bad.get(positions[k], (0, 0, 0))
        bad[positions[k]] = (
            nan + int(np.isnan(mine).sum()),
            posinf + int((mine == np.inf).sum()),
            neginf + int((mine == -np.inf).sum()),
        )
