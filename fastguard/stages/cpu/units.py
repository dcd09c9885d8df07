"""Unit coefficients on a CPU: reads gradients and weights once, writes the clipped gradients once.

Each unit is a row. Its sum of squares is the float64 sum of float32 dot products of at most `BLOCK`
elements, with a relative error below 5e-7. A row whose sum is not finite is computed again in
float64. Underflow in float32 affects only norms below 1e-15. These are below every limit unless
`clip_factor * eps` is that small; only then, rows with small sums are computed again too.

Uses NumPy on one thread: torch takes ten times as long if another process keeps a core busy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.cpu_threads import sums_of_squares
from fastguard.gradients.memory_order import flat
from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages.cpu.vectors import flattened
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype

BLOCK = 512  # elements of a dot product in float32
PIECE = 2**18  # elements that are upcast at a time
SMALL = 2**14  # up to this number of elements, a tensor is read together with others
TOGETHER = 64  # at most this number of small tensors are read together
SMALLEST_LIMIT = 1e-15  # below, small sums are computed again
SMALLEST_SUM = 1e-28  # smaller sums of squares may have lost elements to underflow
MAX_INDEXED = 0.25  # up to this fraction of rows is scaled by indexing; above, the whole tensor


def unit_coefs(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Computes the coefficient of each unit: see `fastguard.stages.reference_units.unit_coefs`."""
    scale = 1.0 if inv_scale is None else inv_scale.item()
    grads, numbers = units.bucket.grads, limits.tolist()
    return torch.from_numpy(
        coefs_of(grads, units.weights, units.counts, numbers, norm_type, propagates, scale)
    )


def coefs_of(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[float],
    norm_type: float,
    propagates: bool,
    scale: float,
) -> np.ndarray:
    """Returns the coefficient of each unit, float64 `(U,)`.

    Args:
        grads, weights: Gradients of one dtype, and their weights, of one dtype too.
        counts: Number of units of each; 0 for a tensor that is left out.
        numbers: `clip_factor` and `eps`.
        norm_type, propagates: See `fastguard.stages.reference_units.unit_coefs`.
        scale: The factor that unscales the gradients.
    """
    clip_factor, eps = numbers
    watch_small = clip_factor * eps < SMALLEST_LIMIT * max(scale, 1.0)
    shared = _of_one_length(weights, counts)
    with np.errstate(all="ignore"):  # rows with an overflow or NaN are computed again
        norms = _all_norms(grads, counts, shared, norm_type, propagates, watch_small)
        weight_norms = _all_norms(weights, counts, shared, norm_type, True, False)
        if scale != 1.0:
            norms *= scale
        limit = clip_factor * np.maximum(weight_norms, eps)  # NaN stays NaN
        clips = (norms > limit) | np.isnan(norms)  # False for a NaN limit
        return np.where(clips, limit / norms, 1.0)


def _of_one_length(weights: Sequence[Tensor], counts: Sequence[int]) -> list[list[int]]:
    """Returns groups of positions that are read together: small tensors with equal row lengths."""
    members: dict[int, list[int]] = {}
    for i, (weight, n) in enumerate(zip(weights, counts, strict=True)):
        if n:
            size = weight.numel()
            members.setdefault(size // n if size <= SMALL else -1 - i, []).append(i)
    return [
        positions[first : first + TOGETHER]
        for positions in members.values()
        for first in range(0, len(positions), TOGETHER)
    ]


def _all_norms(
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    shared: list[list[int]],
    norm_type: float,
    propagates: bool,
    watch_small: bool,
) -> np.ndarray:
    """Returns the norm of each unit, float64 `(U,)`."""
    starts = list(accumulate(counts, initial=0))
    norms = np.empty(starts[-1])
    for positions in shared:
        first = positions[0]
        if len(positions) == 1:
            rows = _rows(tensors[first], counts[first])
            own = _row_norms(rows, norm_type, propagates, watch_small)
            norms[starts[first] : starts[first + 1]] = own
            continue
        members = [tensors[i] for i in positions]
        length = members[0].numel() // counts[first]
        rows = flattened(members).view(-1, length)
        own = _row_norms(rows, norm_type, propagates, watch_small)
        end = 0
        for i in positions:
            norms[starts[i] : starts[i + 1]] = own[end : (end := end + counts[i])]
    return norms


def _row_norms(rows: Tensor, norm_type: float, propagates: bool, watch_small: bool) -> np.ndarray:
    """Returns the norm of each row, float64."""
    # .numpy() refuses tensors that require grad, and negative views, whose memory is not negated.
    rows = rows.detach().resolve_neg()
    out = np.empty(len(rows))
    if norm_type != 2.0:
        _exact(rows, np.arange(len(out)), norm_type, propagates, out)
        return out
    for at in _pieces(rows):
        _sums_of_squares(rows[at], out[at])
    again = ~(out < math.inf)  # True for NaN
    if watch_small:
        again |= out < SMALLEST_SUM
    np.sqrt(out, out=out)
    if again.any():
        _exact(rows, np.flatnonzero(again), norm_type, propagates, out)
    return out


def _rows(x: Tensor, n: int) -> Tensor:
    """Returns a tensor as `(n, row)`, with elements in memory order to avoid a copy if possible."""
    if n == 1:
        return flat(x)[None] if x.dim() else x.reshape(1, 1)
    if not x.is_contiguous():  # such as channels_last
        inner = sorted(range(1, x.dim()), key=x.stride, reverse=True)
        x = x.permute(0, *inner)
    return x.reshape(n, -1)


def _pieces(rows: Tensor) -> list[slice]:
    """Returns slices of rows: one for all rows, or several where rows must be upcast first."""
    n, row = rows.shape
    if rows.dtype in (torch.float32, torch.float64):
        return [slice(0, n)]
    each = max(1, PIECE // row)
    return [slice(i, i + each) for i in range(0, n, each)]


def _sums_of_squares(rows: Tensor, out: np.ndarray) -> None:
    wide = rows if rows.dtype is torch.float64 else rows.float()
    x = wide.numpy()
    n, row = x.shape
    block = _block(row)
    whole = row - row % block
    blocks = x[:, :whole].reshape(n, -1, 1, block)
    np.sum(sums_of_squares(blocks), axis=1, dtype=np.float64, out=out)
    if whole < row:
        out += sums_of_squares(x[:, None, whole:])


@functools.cache
def _block(row: int) -> int:
    """Returns the length of dot products: a divisor of the row length if a large one exists."""
    if row <= BLOCK:
        return row
    return next((d for d in range(BLOCK, BLOCK // 4, -1) if row % d == 0), BLOCK)


def _exact(
    rows: Tensor, numbers: np.ndarray, norm_type: float, propagates: bool, out: np.ndarray
) -> None:
    """Writes the norms of these rows, computed in float64 relative to the largest element."""
    length = rows.shape[1]
    each = max(1, PIECE // length)
    for first in range(0, len(numbers), each):
        at = numbers[first : first + each]
        some = rows[at[0] : at[0] + 1] if len(at) == 1 else rows[torch.from_numpy(at)]
        columns = some.split(PIECE, dim=1)
        parts = [_power_sums(piece.double().numpy(), norm_type) for piece in columns]
        norms = _joined(parts, norm_type)
        if propagates:
            total = sum(piece.float().sum(1).double() for piece in map(_nonfinite, columns))
            bad = total.numpy()  # type: ignore[union-attr]
            norms = np.where(np.isnan(bad), np.nan, np.where(bad > 0, np.inf, norms))
        out[at] = norms


def _nonfinite(piece: Tensor) -> Tensor:
    """Returns 0 for finite elements, Inf for infinite ones, and NaN for NaN."""
    return torch.where(piece.isfinite(), 0.0, piece.abs().float())


def _power_sums(x: np.ndarray, norm_type: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest finite magnitude of each row, and the power sum relative to it."""
    x = np.abs(np.where(np.isfinite(x), x, 0.0))  # NaN is not finite
    largest = x.max(1)
    if norm_type == math.inf:
        return largest, np.ones_like(largest)
    unit = np.where(largest > 0, largest, 1.0)
    return unit, ((x / unit[:, None]) ** norm_type).sum(1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], norm_type: float) -> np.ndarray:
    """Combines results of `_power_sums` for pieces of rows into norms of the rows."""
    unit = np.maximum.reduce([unit for unit, _ in parts])
    if norm_type == math.inf:
        return unit
    total = sum((own / unit) ** norm_type * power for own, power in parts)
    return unit * total ** (1 / norm_type)


def scale_units(units: UnitBucket, coefs: Tensor) -> None:
    """Scales each unit in place: see `fastguard.stages.reference_units.scale_units`."""
    host = coefs.numpy()
    changes = host != 1.0  # True for NaN
    if not changes.any():
        return
    tiny = (host > 0.0) & (host < SMALLEST_FACTOR)
    dtype = factor_dtype(units.bucket.dtype)
    if dtype is torch.float32 and tiny.any():  # not normal float32: multiply in two steps
        first = np.where(tiny, SMALLEST_FACTOR, 1.0)
        _multiply(units, torch.from_numpy(first).to(dtype), tiny)
        coefs = torch.from_numpy(host / first)
    _multiply(units, coefs.to(dtype), changes)


def _multiply(units: UnitBucket, factors: Tensor, changes: np.ndarray) -> None:
    """Multiplies the units in `changes`; in small tensors all units, the others by 1."""
    starts = units.starts
    n_changed = np.add.reduceat(np.append(changes, False).astype(np.int64), starts)
    whole: list[Tensor] = []
    by: list[Tensor] = []
    of_tensors = units.bucket.grads, units.counts, starts[:-1], n_changed[:-1].tolist()
    for grad, n, start, changed in zip(*of_tensors, strict=True):
        if not n or not changed:
            continue
        own = factors[start : start + n]
        if grad.numel() > SMALL and changed < MAX_INDEXED * n:
            at = torch.from_numpy(np.flatnonzero(changes[start : start + n]))
            grad[at] *= own[at].view(-1, *[1] * (grad.dim() - 1))
        else:
            whole.append(grad)
            by.append(own.view(n, *[1] * (grad.dim() - 1)) if grad.dim() else own.view(()))
    if any(map(Tensor.is_neg, whole)):  # foreach cannot write to negative views
        for grad, own in zip(whole, by, strict=True):
            grad.mul_(own)
    elif whole:
        torch._foreach_mul_(whole, by)
