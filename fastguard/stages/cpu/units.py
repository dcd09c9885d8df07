"""Clips units on a CPU, in parts that fit the cache: reads 2N bytes and writes clipped units.

A part is one tensor, or several small ones. The norms of its units are computed, then its clipped
units are scaled while the gradients are still in the cache, which reads them from memory only once:
if all units of ResNet-50 are clipped, this saves 2 of 18 ms [EPYC, one thread].

Each unit is a row, see `row_norms`. Norms have a relative error below 5e-7. The number of calls per
part matters: on a large model, a call of NumPy or torch takes several times as long as usual, since
the gradients fill the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.unit_buckets import UnitBucket
from fastguard.gradients.vectors import few, flattened
from fastguard.stages.cpu.row_norms import (
    as_rows,
    exact_norms,
    norms_of_stacks,
    norms_of_tensors,
    norms_of_vectors,
)
from fastguard.stages.formulas import SMALLEST_FACTOR, factor_dtype

SMALL = 2**14  # up to this number of elements, a tensor is read together with others
SHORT = 2**11  # tensors of one unit, up to this number of elements, are read together
PART = 2**22  # bytes of gradients in a part, unless a single tensor is larger
LARGEST_PART = 2**24  # bytes of gradients in a part; larger tensors are divided
SMALLEST_LIMIT = 1e-15  # below this limit, small norms are computed again
SMALLEST_NORM = 1e-14  # smaller norms may have lost elements to underflow
MANY = 8  # up to this number of units, the whole tensor is scaled
# up to this fraction of units is scaled by indexing; with more, the whole tensor is scaled
MAX_INDEXED = 0.25


@dataclass(frozen=True, slots=True)
class _Part:
    """Some tensors, or some rows of one, which are read by one thread.

    Attributes:
        grads, weights: The gradients and their weights.
        counts: Number of units of each gradient.
        starts: Index of the first unit of each gradient among all units.
    """

    grads: list[Tensor]
    weights: list[Tensor]
    counts: list[int]
    starts: list[int]

    def add(self, grad: Tensor, weight: Tensor, n: int, start: int) -> None:
        """Adds a tensor."""
        self.grads.append(grad)
        self.weights.append(weight)
        self.counts.append(n)
        self.starts.append(start)

    def place(self, i: int) -> int:
        """Returns the index among all units of the unit with this index in the part."""
        for start, n in zip(self.starts, self.counts, strict=True):
            if i < n:
                return start + i
            i -= n
        raise IndexError(i)

    def stacks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the units of the gradients or the weights as rows, `(n, row)`."""
        return [as_rows(t, n) for t, n in zip(tensors, self.counts, strict=True)]

    def norms(self, tensors: list[Tensor]) -> np.ndarray:
        """Returns the norm of each unit of the gradients or the weights."""
        return norms_of_stacks(self.stacks(tensors))


class _LargePart(_Part):
    """Some tensors, or some rows of one, which are read by several threads."""

    __slots__ = ()

    def norms(self, tensors: list[Tensor]) -> np.ndarray:
        """Returns the norm of each unit of the gradients or the weights."""
        return norms_of_tensors(tensors, self.counts)


class _Vectors(_Part):
    """Some tensors with few elements and one unit each, which are read in float64."""

    __slots__ = ()

    def norms(self, tensors: list[Tensor]) -> np.ndarray:
        """Returns the norm of each unit of the gradients or the weights."""
        return norms_of_vectors(tensors)


class _SmallPart(_Part):
    """Some small tensors, sorted by the length of their rows, which are read by one thread."""

    __slots__ = ()

    def stacks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Concatenates tensors with rows of equal length."""
        lengths = [t.numel() // n for t, n in zip(tensors, self.counts, strict=True)]
        stacks, first = [], 0
        for length, group in groupby(lengths):
            stop = first + len(list(group))
            if stop - first == 1:
                stacks.append(as_rows(tensors[first], self.counts[first]))
            else:
                stacks.append(flattened(tensors[first:stop]).view(-1, length))
            first = stop
        return stacks


def clip_units(
    units: UnitBucket,
    limits: Tensor,
    norm_type: float,
    propagates: bool,
    inv_scale: Tensor | None = None,
    skips: Tensor | None = None,
) -> Tensor:
    """Clips the units of one bucket: see `fastguard.stages.reference_units.clip_units`."""
    if skips is not None and skips.item():
        return torch.tensor([1, 0, 0, 0], dtype=torch.float64, device="cpu")
    scale = 1.0 if inv_scale is None else inv_scale.item()
    clip_factor, eps = limits.tolist()
    rule = _Rule(clip_factor, eps, norm_type, propagates, scale)
    smallest, n_clipped, at = 1.0, 0, 0
    with np.errstate(all="ignore"):  # rows with an overflow or NaN are computed again
        for part in _parts(units.bucket.grads, units.weights, units.counts):
            coefs, least = rule.coefs(part)
            if least == 1.0:
                continue
            n_clipped += _scale(part, coefs, least)
            # the condition is True for a first NaN
            if not (least >= smallest or math.isnan(smallest)):
                # argmin gives the index of a NaN if there is one
                smallest, at = least, part.place(int(coefs.argmin()))
    return torch.tensor([smallest, n_clipped, 0, at], dtype=torch.float64, device="cpu")


def coefs_of(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[float],
    propagates: bool,
    scale: float,
) -> np.ndarray:
    """Returns the coefficient of each unit for the L2 norm, float64 `(U,)`.

    Args:
        grads, weights: Gradients of one dtype, and their weights, which also have one dtype.
        counts: Number of units of each; 0 for a tensor that is left out.
        numbers: `clip_factor` and `eps`.
        propagates: See `fastguard.stages.reference_units.unit_coefs`.
        scale: The factor that unscales the gradients.
    """
    clip_factor, eps = numbers
    rule = _Rule(clip_factor, eps, 2.0, propagates, scale)
    coefs = np.ones(sum(counts))
    with np.errstate(all="ignore"):
        for part in _parts(grads, weights, counts):
            (own, least), end = rule.coefs(part), 0
            if least == 1.0:
                continue
            for start, n in zip(part.starts, part.counts, strict=True):
                coefs[start : start + n] = own[end : (end := end + n)]
    return coefs


@dataclass(frozen=True, slots=True)
class _Rule:
    """How the coefficients of units are computed: see `coefs_of`."""

    clip_factor: float
    eps: float
    norm_type: float
    propagates: bool
    scale: float

    @property
    def is_plain(self) -> bool:
        """Whether norms can be computed in float32: L2 norms, and no limit is extremely small."""
        return (
            self.norm_type == 2.0
            and SMALLEST_LIMIT * max(self.scale, 1.0) < self.clip_factor * self.eps
            and self.eps < 1e30
            and 1e-100 < self.scale < 1e100
        )

    def coefs(self, part: _Part) -> tuple[np.ndarray, float]:
        """Returns the coefficients of the units of a part, float64, and the smallest one.

        NaN counts as the smallest.
        """
        if self.is_plain:
            limits, norms = part.norms(part.weights), part.norms(part.grads)
            coefs = np.divide(np.maximum(limits, self.eps, out=limits), norms, dtype=np.float64)
            coefs *= self.clip_factor / self.scale
            smallest = coefs.min().item()
            # The test is False for NaN, and for 0, whose norm may have overflowed. A norm of 0
            # gives Inf.
            if smallest > 0.0 and (coefs.max() < math.inf or limits.max() < math.inf):
                return np.minimum(coefs, 1.0, out=coefs), min(smallest, 1.0)
        coefs = self._exact_coefs(part)
        return coefs, coefs.min().item()

    def _exact_coefs(self, part: _Part) -> np.ndarray:
        """Returns the coefficients if some norms must be computed again in float64."""
        limits = self._exact_norms(part, part.weights, True)
        norms = self._exact_norms(part, part.grads, self.propagates) * self.scale
        limits = self.clip_factor * np.maximum(limits, self.eps)  # `maximum` keeps NaN
        exceeds = (norms > limits) | np.isnan(norms)  # the comparison is False for a NaN limit
        return np.where(exceeds, limits / norms, 1.0)

    def _exact_norms(self, part: _Part, tensors: list[Tensor], propagates: bool) -> np.ndarray:
        if self.norm_type == 2.0:
            norms = part.norms(tensors).astype(np.float64)
            again = ~(norms < math.inf)  # True for NaN
            if not self.is_plain:
                again |= norms < SMALLEST_NORM
        else:
            norms = np.empty(sum(part.counts))
            again = np.ones(len(norms), bool)
        if again.any():
            exact_norms(part.stacks(tensors), self.norm_type, propagates, again, norms)
        return norms


def _parts(
    grads: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int]
) -> Iterator[_Part]:
    """Yields all tensors that have units, in parts of about `PART` bytes."""
    sizes = [w.numel() if n else 0 for w, n in zip(weights, counts, strict=True)]
    starts = list(accumulate(counts, initial=0))
    large: list[int] = []
    small: list[int] = []
    vectors: list[int] = []
    for i, size in enumerate(sizes):
        if size > SMALL:
            large.append(i)
        elif size:
            (vectors if counts[i] == 1 and size <= SHORT else small).append(i)
    small.sort(key=lambda i: sizes[i] // counts[i])
    kind = _Part if few(sizes) else _LargePart
    for positions, new in ((vectors, _Vectors), (small, _SmallPart), (large, kind)):
        part, filled = new([], [], [], []), 0
        for i in positions:
            whole = grads[i], weights[i], counts[i], starts[i]
            for piece in _pieces(*whole) if grads[i].nbytes > LARGEST_PART else (whole,):
                n_bytes = piece[0].nbytes
                if filled and filled + n_bytes > PART:
                    yield part
                    part, filled = new([], [], [], []), 0
                part.add(*piece)
                filled += n_bytes
        if filled:
            yield part


def _pieces(
    grad: Tensor, weight: Tensor, n: int, start: int
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Splits a tensor of n units by rows; its first unit has the index `start`."""
    n_pieces = min(n, -(-grad.nbytes // LARGEST_PART))
    if n_pieces <= 1:
        yield grad, weight, n, start
        return
    each = -(-n // n_pieces)
    grad = grad.detach()
    for first in range(0, n, each):
        k = min(each, n - first)
        yield grad.narrow(0, first, k), weight.narrow(0, first, k), k, start + first


def _scale(part: _Part, coefs: np.ndarray, smallest: float) -> int:
    """Multiplies the units of a part by their coefficients; returns the number of these units."""
    changes = coefs != 1.0  # True for NaN
    n_changes = int(np.count_nonzero(changes))
    dtype = factor_dtype(part.grads[0].dtype)
    if not smallest >= SMALLEST_FACTOR and dtype is torch.float32:  # True for NaN
        # Factors that are not normal float32 are multiplied in two steps.
        first = np.where((coefs > 0.0) & (coefs < SMALLEST_FACTOR), SMALLEST_FACTOR, 1.0)
        _multiply(part, first, changes, n_changes, dtype)
        coefs = coefs / first
    _multiply(part, coefs, changes, n_changes, dtype)
    return n_changes


def _multiply(
    part: _Part, coefs: np.ndarray, changes: np.ndarray, n_changes: int, dtype: torch.dtype
) -> None:
    """Multiplies the units in `changes`; in tensors with many, also all other units, by 1."""
    factors = coefs if dtype is torch.float64 else coefs.astype(np.float32)
    by = _by_unit(torch.from_numpy(factors), part)
    if n_changes == len(coefs):
        _multiply_tensors(part.grads, by)
        return
    grads, of_grads = [], []
    indices = [0, *accumulate(part.counts)]
    n_changed = np.add.reduceat(changes, indices[:-1], dtype=np.int64).tolist()
    of_tensors = zip(part.grads, by, part.counts, n_changed, indices, strict=False)
    for grad, own, n, changed, start in of_tensors:
        if n > MANY and changed < MAX_INDEXED * n:
            if changed:
                at = torch.from_numpy(np.flatnonzero(changes[start : start + n]))
                grad[at] *= own[at]
        elif changed:
            grads.append(grad)
            of_grads.append(own)
    if grads:
        _multiply_tensors(grads, of_grads)


def _by_unit(factors: Tensor, part: _Part) -> list[Tensor]:
    """Returns the factors of each gradient, in a shape that can be broadcast to it."""
    # Tensor.split is implemented in Python and takes three times as long.
    counts = part.counts
    by = (factors,) if len(counts) == 1 else torch.unsafe_split_with_sizes(factors, counts)
    return [
        own if (dim := grad.dim()) == 1 else own.view((-1,) + (1,) * (dim - 1) if dim else ())
        for own, grad in zip(by, part.grads, strict=True)
    ]


def _multiply_tensors(grads: list[Tensor], by: list[Tensor]) -> None:
    if len(grads) == 1 or any(map(Tensor.is_neg, grads)):  # foreach cannot write negative views
        for grad, own in zip(grads, by, strict=True):
            grad.mul_(own)
    else:
        torch._foreach_mul_(grads, by)
