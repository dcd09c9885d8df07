"""Unit coefficients on a CPU: one read of gradients and weights, one write of what is clipped.

Each unit is a row. Its sum of squares is added up from dot products of at most `BLOCK` float32
elements each, in float64: true to 1e-7. A row whose sum is not finite is looked at again in
float64. Squares that float32 flushes to zero belong to norms below 1e-15, which are below every
limit unless `clip_factor * eps` is as small; then small sums are looked at again too.

NumPy on one thread: torch takes ten times as long where another process keeps a core busy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.stages.cpu.vectors import flat
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype

BLOCK = 512  # elements of a dot product in float32
PIECE = 2**18  # elements that become wider at a time
SMALLEST_LIMIT = 1e-15
SMALLEST_SUM = 1e-28
MOST_ROWS = 0.25  # of a tensor that are picked out to be scaled; above, all of it is multiplied


def unit_coefs(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """The coefficient of each unit: see `fastguard.stages.reference_units.unit_coefs`."""
    clip_factor, eps = limits.tolist()
    scale = 1.0 if inv_scale is None else inv_scale.item()
    watch_small = clip_factor * eps < SMALLEST_LIMIT * max(scale, 1.0)
    n = units.starts[-1]
    norms, weight_norms = np.empty(n), np.empty(n)
    with np.errstate(all="ignore"):  # what overflows or is NaN is looked at again
        for grad, weight, k, start in zip(
            units.bucket.grads, units.weights, units.counts, units.starts[:-1], strict=True
        ):
            if k:
                _norms(grad, norm_type, propagates, watch_small, norms[start : start + k])
                _norms(weight, norm_type, True, False, weight_norms[start : start + k])
        if inv_scale is not None:
            norms *= scale
        limit = clip_factor * np.maximum(weight_norms, eps)  # NaN stays NaN
        clips = (norms > limit) | np.isnan(norms)  # no norm is above NaN
        return torch.from_numpy(np.where(clips, limit / norms, 1.0))


def _norms(
    x: Tensor, norm_type: float, propagates: bool, watch_small: bool, out: np.ndarray
) -> None:
    """Writes the norm of each row of one tensor."""
    # What requires grad has no .numpy(), and memory does not show a negative bit.
    rows = _rows(x.detach().resolve_neg(), len(out))
    if norm_type != 2.0:
        numbers = np.arange(len(out))
        _exact(rows, numbers, norm_type, propagates, out)
        return
    for at in _pieces(rows):
        _sums_of_squares(rows[at], out[at])
    again = ~(out < math.inf)  # NaN is not
    if watch_small:
        again |= out < SMALLEST_SUM
    np.sqrt(out, out=out)
    if again.any():
        _exact(rows, np.flatnonzero(again), norm_type, propagates, out)


def _rows(x: Tensor, n: int) -> Tensor:
    """`(n, row)`, in whatever order of the elements lets them stay where they are."""
    if n == 1:
        return flat(x)[None] if x.dim() else x.reshape(1, 1)
    if not x.is_contiguous():  # channels_last, say
        inner = sorted(range(1, x.dim()), key=x.stride, reverse=True)
        x = x.permute(0, *inner)
    return x.reshape(n, -1)


def _pieces(rows: Tensor) -> list[slice]:
    """All rows where they are read as they are; of narrow dtypes, as many as widen at a time."""
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
    sums = np.matmul(blocks, blocks.transpose(0, 1, 3, 2))[:, :, 0, 0]
    np.sum(sums, axis=1, dtype=np.float64, out=out)
    if whole < row:
        rest = x[:, None, whole:]
        out += np.matmul(rest, rest.transpose(0, 2, 1))[:, 0, 0]


def _block(row: int) -> int:
    """Elements of a dot product: as many as divide a row, where that are not too few."""
    if row <= BLOCK:
        return row
    return next((d for d in range(BLOCK, BLOCK // 4, -1) if row % d == 0), BLOCK)


def _exact(
    rows: Tensor, numbers: np.ndarray, norm_type: float, propagates: bool, out: np.ndarray
) -> None:
    """Writes the norms of the rows of these numbers, from float64 elements over the largest."""
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
    """0 for finite elements, Inf for infinite ones, NaN for NaN."""
    return torch.where(piece.isfinite(), 0.0, piece.abs().float())


def _power_sums(x: np.ndarray, norm_type: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest finite magnitude of each row, and the power sum of all divided by it."""
    x = np.abs(np.where(np.isfinite(x), x, 0.0))  # NaN is not finite
    largest = x.max(1)
    if norm_type == math.inf:
        return largest, np.ones_like(largest)
    unit = np.where(largest > 0, largest, 1.0)
    return unit, ((x / unit[:, None]) ** norm_type).sum(1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], norm_type: float) -> np.ndarray:
    """The norms of rows from those of their pieces."""
    unit = np.maximum.reduce([unit for unit, _ in parts])
    if norm_type == math.inf:
        return unit
    total = sum((own / unit) ** norm_type * power for own, power in parts)
    return unit * total ** (1 / norm_type)


def scale_units(units: UnitBucket, coefs: Tensor) -> None:
    """Scales each unit: see `fastguard.stages.reference_units.scale_units`."""
    host = coefs.numpy()
    changes = host != 1.0  # NaN is not 1
    if not changes.any():
        return
    for grad, n, start in zip(units.bucket.grads, units.counts, units.starts[:-1], strict=True):
        changed = int(np.count_nonzero(changes[start : start + n]))
        if not changed:
            continue
        own = coefs[start : start + n]
        if changed > MOST_ROWS * n:
            _multiply(grad, own)
        else:
            at = torch.from_numpy(np.flatnonzero(changes[start : start + n]))
            grad[at] = _multiply(grad[at], own[at])


def _multiply(grad: Tensor, coefs: Tensor) -> Tensor:
    shape = (len(coefs), *[1] * (grad.dim() - 1)) if grad.dim() else ()
    coefs = coefs.reshape(shape)
    dtype = factor_dtype(grad.dtype)
    tiny = (coefs > 0) & (coefs < SMALLEST_FACTOR)
    if dtype is torch.float32 and tiny.any():  # float32 could not hold them: in two steps
        first = torch.where(tiny, SMALLEST_FACTOR, 1.0)
        grad.mul_(first.to(dtype))
        coefs = coefs / first
    return grad.mul_(coefs.to(dtype))
