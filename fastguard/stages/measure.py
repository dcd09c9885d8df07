"""Stage 1, measure: one read of the gradients gives `GradStats`.

    GradStats.power_sum[s] = sum over the finite elements g of segment s of |g * inv_scale|^p

Where that sum can leave float64 (squares of float64 gradients, tenth powers of float32 ones), the
stages hand on its root instead, taken of elements that were divided by the largest: see
`holds_norms`.

I/O: reads every gradient once (N bytes), writes O(S + T) numbers. Only a segment whose sum is not
finite is looked at again, to count what is NaN, +Inf or -Inf in which tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.errors import Culprit
from fastguard.errors.checked_numbers import number_of
from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.tensor_kinds import PLAIN, Kind
from fastguard.gradients.transfer import moved
from fastguard.stages import backend


@dataclass(frozen=True, slots=True)
class GradStats:
    """What one read of the gradients says. All tensors live on one device.

    Attributes:
        summary: float64 `(4, S)`: of each segment the power sum (or norm, see `rooted`) and how
            many elements are NaN, +Inf and -Inf. One tensor, because that is what ranks exchange.
        counts: int64 `(3, T)`: NaN, +Inf and -Inf of each tensor on this rank.
        norm_type: p.
        names: One name a tensor, or None: then they are called `parameter i`.
        float64: Whether any gradient is float64; `total_norm` is then float64 too.
        rooted: Whether the first row of `summary` holds norms in place of power sums: these could
            leave float64. False for the inf-norm, whose "power sum" is the norm.
        kind: That of the gradients, and so of the tensors here.
    """

    summary: Tensor
    counts: Tensor
    norm_type: float
    names: Sequence[str] | None = None
    float64: bool = False
    rooted: bool = False
    kind: Kind = PLAIN

    @property
    def power_sum(self) -> Tensor:
        """float64 `(S,)`: sum of |g|^p over the finite elements; for the inf-norm their maximum.

        Where it leaves float64 it is inf or 0; `segment_norms` are right there too.
        """
        values = self._row(self.summary, 0)
        return values.pow(self.norm_type) if self.rooted else values

    @property
    def segment_counts(self) -> Tensor:
        """float64 `(3, S)`: how many elements of each segment are NaN, +Inf, -Inf."""
        return self.summary[1:] if self.kind is PLAIN else self.summary.narrow(0, 1, 3)

    @property
    def nan_count(self) -> Tensor:
        """int64 `(T,)`: NaN elements of each tensor."""
        return self._row(self.counts, 0)

    @property
    def posinf_count(self) -> Tensor:
        """int64 `(T,)`: +Inf elements of each tensor."""
        return self._row(self.counts, 1)

    @property
    def neginf_count(self) -> Tensor:
        """int64 `(T,)`: -Inf elements of each tensor."""
        return self._row(self.counts, 2)

    @property
    def segment_norms(self) -> Tensor:
        """float64 `(S,)`: the norm of the finite elements of each segment."""
        values = self._row(self.summary, 0)
        return values if self.rooted else root(values, self.norm_type)

    @property
    def total_norm64(self) -> Tensor:
        """float64 `()`: the norm of the finite elements of the whole model."""
        summary = self.summary
        if summary.numel() == 4:  # one segment
            value = summary[0, 0] if self.kind is PLAIN else summary.select(0, 0).select(0, 0)
            return value if self.rooted else root(value, self.norm_type)
        values = self._row(summary, 0)
        if self.rooted:
            return norm_of_norms(values, self.norm_type)
        whole = values.amax() if self.norm_type == math.inf and values.numel() else values.sum()
        return root(whole, self.norm_type)

    @property
    def total_norm(self) -> Tensor:
        """float32 `()` (float64 if any gradient is): the norm of all finite elements."""
        norm = self.total_norm64
        return norm if self.float64 else norm.float()

    @property
    def found_nonfinite(self) -> Tensor:
        """float32 `()`: 1 if any element of the whole model is NaN or Inf, else 0."""
        return (self.segment_counts.sum() > 0).float()

    def _row(self, t: Tensor, i: int) -> Tensor:
        # Indexing is quicker, but asks the device, which need not be there for placeholders.
        return t[i] if self.kind is PLAIN else t.select(0, i)

    def culprits(self) -> list[Culprit]:
        """`(name, nan, posinf, neginf)` of each tensor with non-finite elements. Waits."""
        counts = self.counts.cpu()
        bad = counts.sum(0).nonzero().squeeze(1).tolist()
        rows = counts[:, bad].T.tolist()
        return [(self.name(i), *row) for i, row in zip(bad, rows, strict=True)]

    def name(self, i: int) -> str:
        return self.names[i] if self.names is not None else f"parameter {i}"


def root(power_sum: Tensor, norm_type: float) -> Tensor:
    """The p-norm that belongs to a power sum."""
    if norm_type == math.inf:
        return power_sum
    return power_sum.sqrt() if norm_type == 2.0 else power_sum.pow(1.0 / norm_type)


LARGEST_POWER = 6.0
"""p up to which a sum of |x|^p stays in float64 for every float32 x: 2**-149 to 2**128."""


def holds_norms(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether what a stage measures of gradients of this dtype are norms in place of power sums."""
    return norm_type != math.inf and (dtype is torch.float64 or norm_type > LARGEST_POWER)


def norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    """float64: the norm of everything, from the norms of its parts along the first dimension.

    Right wherever it is a float64 itself; inf where it is larger than any.
    """
    if not norms.shape[0]:
        return norms.sum(0)
    largest = norms.amax(0)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return root((norms / unit).pow(norm_type).sum(0), norm_type) * unit


def measure(
    buckets: GradBuckets, norm_type: float = 2.0, inv_scale: Tensor | None = None
) -> GradStats:
    """Reads every gradient once.

    Args:
        buckets: The gradients.
        norm_type: p > 0, or `inf`.
        inv_scale: `()` float tensor: what a loss scaler would multiply the gradients by. The stats
            are those of the unscaled gradients; the gradients themselves stay as they are.

    Returns:
        The stats, on `buckets.device`. Waits for a GPU only if they come from there to a CPU.
    """
    home = buckets.device
    rooted = any(holds_norms(bucket.dtype, norm_type) for bucket in buckets.buckets)
    summary = counts = None
    for bucket in buckets.buckets:
        part, found = backend.stages(bucket.device, bucket.kind).measure(
            bucket, buckets.n_measured, buckets.n_tensors, norm_type, inv_scale
        )
        part, found = moved(part, home), moved(found, home)
        if rooted and not holds_norms(bucket.dtype, norm_type):
            norms = root(part.narrow(0, 0, 1), norm_type)
            part = torch.cat([norms, part.narrow(0, 1, 3)])
        summary = part if summary is None else _joined(summary, part, norm_type, rooted)
        counts = found if counts is None else counts + found
    if summary is None or counts is None:
        summary = torch.zeros(4, buckets.n_measured, dtype=torch.float64, device=home)
        counts = torch.zeros(3, buckets.n_tensors, dtype=torch.int64, device=home)
    return GradStats(
        summary, counts, norm_type, buckets.names, buckets.float64, rooted, buckets.kind
    )


def _joined(a: Tensor, b: Tensor, norm_type: float, rooted: bool) -> Tensor:
    if norm_type != math.inf and not rooted:
        return a + b
    one, other = a.narrow(0, 0, 1), b.narrow(0, 0, 1)
    if rooted:
        first = norm_of_norms(torch.cat([one, other]), norm_type).reshape(1, -1)
    else:
        first = torch.maximum(one, other)
    return torch.cat([first, a.narrow(0, 1, 3) + b.narrow(0, 1, 3)])


def norm_type_of(value: object) -> float:
    """The p of a p-norm as a float.

    Raises:
        TypeError: Not a number (`"inf"` and `"2"` are, as in torch; a bool is not).
        ValueError: Not in (0, inf], or beyond the largest float.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass  # refused below
    p = number_of("norm_type", value, "use 2.0, 1.0 or float('inf')")
    if not p > 0.0:
        raise ValueError(f"norm_type={value!r} is not a norm; use a number > 0 or float('inf')")
    return p
