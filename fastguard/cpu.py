"""Measuring on a CPU: power sums and counts at the speed of memory, norms true to float64.

Formula: `power_sum = sum(|x|^p)`. For p = 2 below float64, rows of 256 elements are reduced in
float32 by `torch.linalg.vector_norm` (one read of the data) and squared and summed in float64.

Numerics. A row norm is off by up to 3e-7. Over rows that differ, these errors average out (1e-10
over 1e6 elements); over rows that are alike, such as a constant gradient, they do not: all are off
in the same direction (3e-7 seen on constants, where torch's own norm is 4e-2 off). So the bias is
*measured*: `AUDITED` blocks of 8 rows, drawn in proportion to what they contribute, are summed
again in float64, and the mean relative error that they show is taken out of the total. Drawing by
contribution makes the estimate unbiased however unevenly the sum is spread: if one block holds
everything, every draw hits it and the result is exact. Where the drawn blocks disagree by more
than random data does (blocks of several constants, say), 32 times as many are drawn. The draws are
at fixed quantiles, so the same gradients give the same norm bit for bit; but not at evenly spaced
ones, which would show one half alone of gradients that repeat at their pace (3e-7 off when blocks
of two constants alternate; 1e-8 as it is).

What float32 cannot hold is noticed and done again in float64: a row that overflows makes the sum
infinite, and a sum under `n_elements * 2**-126 * 1e9` may have lost squares to underflow. The sum
is also the finiteness flag: NaN or Inf in it send the segment to the exact look, which counts NaN,
+Inf and -Inf and sums the rest.

Tried and dropped: float64 throughout (1.8x slower), `vector_norm(dtype=torch.float64)` (20x), rows
of 32 (1.4x, and still up to 9e-8 off), squares into a buffer and `torch.sum` (1.6x, up to 3e-7
off).

Memory: staging buffers of 5 MB a thread, and at most about 8 MB of temporaries.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastguard.buckets import GradBucket

ROW = 256
BLOCK = 8 * ROW  # what one draw of the audit looks at
LARGE = 32 * BLOCK  # smaller tensors are gathered in the staging buffer: a call costs about 10 µs
STAGE = 512 * BLOCK  # elements of the staging buffer: 4 MB of float32, which a level-3 cache holds
WIDE = 64 * BLOCK  # elements of the float64 buffer: 1 MB, which a level-2 cache holds
SHARE = 2**16 * BLOCK  # elements between two audits: bounds the row norms kept to 6 MB
EXACT_BELOW = 2**19  # with fewer elements, float64 throughout costs less than the audit
AUDITED = 32
DISAGREEING = 1.2e-7  # standard deviation of audited errors; random data has 8e-8 at the most
TINY_SQUARE = 2.0**-126  # smallest normal float32: smaller squares may be flushed to zero


def _quantiles(n: int) -> np.ndarray:
    """One number in each of n equal parts of [0, 1); RandomState never changes its stream."""
    return (np.arange(n) + np.random.RandomState(0).rand(n)) / n


_DRAWS = (_quantiles(AUDITED), _quantiles(32 * AUDITED))

Counts = tuple[int, int, int]

_row_norms = torch.linalg.vector_norm
_local = threading.local()


def measure(
    bucket: GradBucket, n_segments: int, norm_type: float
) -> tuple[list[float], dict[int, Counts]]:
    """Power sums of the finite elements of each segment, and counts of the others.

    Args:
        bucket: CPU gradients of one dtype.
        n_segments: S.
        norm_type: p > 0; `inf` gives the maximum in place of the power sum.

    Returns:
        S power sums, and `{position in bucket.grads: (nan, posinf, neginf)}` of the bad tensors
        alone.
    """
    sums = [0.0] * n_segments
    bad: dict[int, Counts] = {}
    for segment, positions in _by_segment(bucket):
        total = _clean_sum(bucket, positions, segment, norm_type)
        if not _trustworthy(total, bucket, positions, norm_type):
            total, found = _exact(bucket, positions, norm_type)
            bad.update(found)
        sums[segment] = total
    return sums, bad


def _by_segment(bucket: GradBucket) -> Iterator[tuple[int, Sequence[int]]]:
    if bucket.segment is not None:
        yield bucket.segment, range(len(bucket.grads))
        return
    members: dict[int, list[int]] = {}
    for i, segment in enumerate(bucket.segment_ids):
        members.setdefault(segment, []).append(i)
    yield from members.items()


def _clean_sum(
    bucket: GradBucket, positions: Sequence[int], segment: int, norm_type: float
) -> float:
    """The power sum if every element is finite; NaN or Inf if one is not, or if float32 gave up."""
    if bucket.runs is not None:
        tensors = [run.flat for run in bucket.runs if run.segment == segment]
    elif len(positions) == len(bucket.grads):
        tensors = bucket.grads
    else:
        tensors = [bucket.grads[i] for i in positions]
    if norm_type == math.inf:
        return torch.stack(torch._foreach_norm(_not_empty(tensors), math.inf)).max().item()
    if norm_type == 2.0 and bucket.dtype is not torch.float64:
        return _l2_power_sum(tensors)
    return sum(_float64_power_sum(x, norm_type) for x, _ in _float64_pieces(tensors))


def _not_empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    """torch has no inf-norm of an empty tensor; zero is the norm of nothing."""
    return [t for t in tensors if t.numel()] or [torch.zeros(1, device="cpu")]


def _trustworthy(
    total: float, bucket: GradBucket, positions: Sequence[int], norm_type: float
) -> bool:
    if not math.isfinite(total):
        return False
    if norm_type != 2.0 or bucket.dtype is torch.float64:
        return True
    if total > 1e-12:  # no gradient that fits a machine can lose anything here
        return True
    n_elements = sum(bucket.grads[i].numel() for i in positions)
    return total > n_elements * TINY_SQUARE * 1e9


# L2 below float64, at the speed of memory.


@dataclass(slots=True)
class _Source:
    """Whole blocks of gradient data: one vector, or a stretch of small ones read as one."""

    vectors: Sequence[Tensor]
    n_blocks: int
    ends: np.ndarray | None = None  # cumulated lengths of `vectors`, if there are several

    def blocks(self, numbers: np.ndarray) -> Iterator[Tensor]:
        """The pieces that make up the blocks of these numbers, in order."""
        if self.ends is None and len(numbers) < 8:  # a view costs 1 µs, gathering 8 µs
            for k in numbers.tolist():
                yield self.vectors[0].narrow(0, k * BLOCK, BLOCK)
            return
        if self.ends is None:
            whole = self.vectors[0].narrow(0, 0, self.n_blocks * BLOCK).unflatten(0, (-1, BLOCK))
            yield whole[torch.from_numpy(numbers)].flatten()
            return
        starts = numbers * BLOCK
        firsts = self.ends.searchsorted(starts, side="right")
        lasts = self.ends.searchsorted(starts + BLOCK, side="left")
        begins = np.concatenate([[0], self.ends])[firsts]  # where the first vector begins
        for start, first, last, begin in zip(
            starts.tolist(), firsts.tolist(), lasts.tolist(), begins.tolist(), strict=True
        ):
            pieces = list(self.vectors[first : last + 1])
            beyond = int(self.ends[last]) - start - BLOCK
            pieces[-1] = pieces[-1].narrow(0, 0, pieces[-1].numel() - beyond)
            inside = start - begin
            pieces[0] = pieces[0].narrow(0, inside, pieces[0].numel() - inside)
            yield from pieces


def _flat(t: Tensor) -> Tensor:
    """A tensor as a vector, in whatever order lets it stay where it is."""
    if not t.is_contiguous():  # channels_last, say
        t = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return t.reshape(-1)


def _l2_power_sum(tensors: Sequence[Tensor]) -> float:
    sizes = list(map(Tensor.numel, tensors))
    n_elements = sum(sizes)
    vectors = tensors if set(map(Tensor.dim, tensors)) == {1} else list(map(_flat, tensors))
    if n_elements < EXACT_BELOW:
        return _wide_l2_power_sum(_gather(vectors, n_elements))
    if n_elements <= SHARE:
        return _share_power_sum(vectors, sizes)
    total = 0.0
    share: list[Tensor] = []
    filled = 0
    for vector in vectors:
        for piece in vector.split(SHARE) if vector.numel() else ():
            if filled + piece.numel() > SHARE:
                total += _share_power_sum(share, list(map(Tensor.numel, share)))
                share, filled = [], 0
            share.append(piece)
            filled += piece.numel()
    return total + _share_power_sum(share, list(map(Tensor.numel, share)))


def _share_power_sum(vectors: Sequence[Tensor], sizes: Sequence[int]) -> float:
    """The sum of squares of vectors of one dtype, `SHARE` elements at the most."""
    rows = torch.empty(sum(sizes) // ROW, dtype=torch.float32, device="cpu")
    sources: list[_Source] = []
    filled = 0

    def reduce_rows(values: Tensor, n_blocks: int) -> None:
        nonlocal filled
        n_rows = n_blocks * (BLOCK // ROW)
        matrix = values[: n_rows * ROW].view(n_rows, ROW)
        _row_norms(matrix, dim=1, out=rows[filled : filled + n_rows])
        filled += n_rows

    small, small_sizes = vectors, sizes
    if max(sizes) >= LARGE:
        small, small_sizes = [], []
        for vector, n in zip(vectors, sizes, strict=True):
            tail = vector
            if n >= LARGE:
                n_blocks, n = divmod(n, BLOCK)
                tail = vector[n_blocks * BLOCK :]
                sources.append(_Source([vector], n_blocks))
                if vector.dtype is torch.float32:
                    reduce_rows(vector.contiguous(), n_blocks)
                else:
                    for piece in vector[: n_blocks * BLOCK].split(STAGE):
                        reduce_rows(_stage(piece.numel()).copy_(piece), piece.numel() // BLOCK)
            if n:
                small.append(tail)
                small_sizes.append(n)

    rest, n_blocks = 0.0, 0
    staged = rows
    for batch, ends in _batches(small, small_sizes):
        n = int(ends[-1])
        staged = _gather(batch, n)
        n_blocks = n // BLOCK
        if n_blocks:
            reduce_rows(staged, n_blocks)
            sources.append(_Source(batch, n_blocks, ends))
        if n % BLOCK:
            rest += _wide_l2_power_sum(staged[n_blocks * BLOCK :])
    if n_blocks:  # of the last batch, which still lies in the staging buffer
        sources[-1] = _Source([staged], n_blocks)
    if not sources:
        return rest
    block_sums = rows[:filled].double().square_().view(-1, BLOCK // ROW).sum(1)
    return rest + _audited_sum(block_sums, sources)


def _audited_sum(block_sums: Tensor, sources: list[_Source]) -> float:
    """The sum over all blocks, with the rounding bias that a sample of them shows taken out."""
    sums = block_sums.numpy()
    running = sums.cumsum()
    total = running[-1].item()
    if not 0.0 < total < math.inf:  # NaN too: the caller looks again
        return total
    errors = np.empty(0)
    for quantiles in _DRAWS:
        drawn = running.searchsorted(quantiles * total).clip(max=len(sums) - 1)
        errors = _true_sums(drawn, sources) / sums[drawn] - 1.0
        if errors.std() < DISAGREEING:
            break
    return total * (1.0 + errors.mean().item())


def _true_sums(drawn: np.ndarray, sources: list[_Source]) -> np.ndarray:
    """The sums of squares of the drawn blocks, in float64. `drawn` ascends."""
    edges = np.cumsum([0, *(source.n_blocks for source in sources)])
    sums = []
    # Sixteen blocks at a time: 32,768 elements are the most that torch leaves to one thread, and
    # waking the others costs more than the sum.
    for some in np.array_split(drawn, -(-len(drawn) // 16)):
        cuts = some.searchsorted(edges)
        pieces: list[Tensor] = []
        for i in np.flatnonzero(np.diff(cuts)).tolist():
            pieces += sources[i].blocks(some[cuts[i] : cuts[i + 1]] - edges[i])
        wide = _buffer("wide", WIDE, torch.float64)[: len(some) * BLOCK].copy_(torch.cat(pieces))
        sums.append(wide.square_().view(-1, BLOCK).sum(1))
    return torch.cat(sums).numpy()


def _wide_l2_power_sum(values: Tensor) -> float:
    """The sum of squares in float64, through a reused buffer: page faults cost more."""
    total = 0.0
    for piece in values.split(WIDE):
        wide = _buffer("wide", WIDE, torch.float64)[: piece.numel()].copy_(piece)
        total += torch.dot(wide, wide).item()
    return total


def _stage(n: int) -> Tensor:
    return _buffer("stage", STAGE, torch.float32)[:n]


def _buffer(name: str, n: int, dtype: torch.dtype) -> Tensor:
    """A buffer of this thread, made once."""
    buffer = getattr(_local, name, None)
    if buffer is None:
        with torch.inference_mode(False):
            buffer = torch.empty(n, dtype=dtype, device="cpu")
        setattr(_local, name, buffer)
    return buffer


def _batches(
    vectors: Sequence[Tensor], sizes: Sequence[int]
) -> Iterator[tuple[Sequence[Tensor], np.ndarray]]:
    """Groups small vectors so that each group fits the staging buffer; with cumulated lengths."""
    ends = np.cumsum(sizes)
    start, before = 0, 0
    while start < len(vectors):
        stop = int(ends.searchsorted(before + STAGE, side="right"))
        if ends[stop - 1] > before:
            yield vectors[start:stop], ends[start:stop] - before
        start, before = stop, ends[stop - 1]


def _gather(batch: Sequence[Tensor], n: int) -> Tensor:
    """Small vectors of one dtype behind each other, as float32 in the staging buffer.

    One float32 vector stays where it is.
    """
    if batch[0].dtype is torch.float32:
        if len(batch) == 1:
            return batch[0].contiguous()
        return torch.cat(list(batch), out=_stage(n))
    return _stage(n).copy_(torch.cat(list(batch)))


# Everything, exactly, in float64.


def _float64_pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """float64 vectors of bounded length that together hold all tensors.

    Yields:
        The values, and `(position in tensors, elements)` of what lies in them, in order.
    """
    limit = STAGE // 4
    batch: list[Tensor] = []
    owners: list[tuple[int, int]] = []
    filled = 0
    for i, t in enumerate(tensors):
        flat = _flat(t)
        for piece in flat.split(limit) if flat.numel() > limit else (flat,):
            if filled + piece.numel() > limit:
                yield torch.cat(batch).double(), owners
                batch, owners, filled = [], [], 0
            batch.append(piece)
            owners.append((i, piece.numel()))
            filled += piece.numel()
    if filled:
        yield torch.cat(batch).double(), owners


def _float64_power_sum(x: Tensor, norm_type: float) -> float:
    if norm_type == 2.0:
        return torch.dot(x, x).item()
    if norm_type == 1.0:
        return x.abs().sum().item()
    if norm_type == math.inf:
        return x.abs().max().item()
    return x.abs().pow_(norm_type).sum().item()


def _exact(
    bucket: GradBucket, positions: Sequence[int], norm_type: float
) -> tuple[float, dict[int, Counts]]:
    """The power sum of the finite elements, and the counts of the others by position."""
    parts: list[float] = []
    bad: dict[int, Counts] = {}
    for x, owners in _float64_pieces([bucket.grads[i] for i in positions]):
        part = _float64_power_sum(x, norm_type)
        if not math.isfinite(part):
            finite = x.isfinite()
            if not finite.all():
                _count(x, finite, owners, positions, bad)
                part = _float64_power_sum(torch.where(finite, x, 0.0), norm_type)
        parts.append(part)
    return (max(parts, default=0.0) if norm_type == math.inf else sum(parts)), bad


def _count(
    x: Tensor,
    finite: Tensor,
    owners: list[tuple[int, int]],
    positions: Sequence[int],
    bad: dict[int, Counts],
) -> None:
    ends = np.cumsum([n for _, n in owners])
    where = (~finite).nonzero().squeeze(1)
    values = x[where].numpy()
    owner = ends.searchsorted(where.numpy(), side="right")
    for k in np.unique(owner):
        mine = values[owner == k]
        position = positions[owners[k][0]]
        nan, posinf, neginf = bad.get(position, (0, 0, 0))
        bad[position] = (
            nan + int(np.isnan(mine).sum()),
            posinf + int((mine == np.inf).sum()),
            neginf + int((mine == -np.inf).sum()),
        )
