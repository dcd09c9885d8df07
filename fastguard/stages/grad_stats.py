"""`GradStats`: what the measure stage yields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastguard.errors import Culprit
from fastguard.gradients.tensor_kinds import PLAIN, Kind, has_numbers
from fastguard.stages.formulas import norm_of_norms, propagated_norms, root


@dataclass(frozen=True, slots=True)
class GradStats:
    """Norms and non-finite counts of the gradients of one step. All tensors are on one device.

    S is the number of segments (a segment is what one clip coefficient applies to), T the number
    of tensors on this rank.

    Attributes:
        summary: float64 `(4, S)`: per segment the power sum (or norm, see `rooted`) and the numbers
            of NaN, +Inf and -Inf elements. A single tensor, since the ranks exchange it.
        counts: int64 `(3, T)`: numbers of NaN, +Inf and -Inf elements per tensor.
        norm_type: p.
        names: Names of the T tensors; None: messages use `parameter i`.
        float64: Whether any gradient is float64; `total_norm` is then float64 too.
        rooted: Whether the first row of `summary` holds norms, because power sums could exceed the
            range of float64. False for the inf-norm, whose "power sum" is the norm.
        kind: Kind of the gradients, and of the tensors here.
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
        """float64 `(S,)`: sum of |g|^p over the finite elements; for the inf-norm the maximum.

        inf or 0 where it exceeds the range of float64; `segment_norms` remain accurate there.
        """
        values = self._row(self.summary, 0)
        return values.pow(self.norm_type) if self.rooted else values

    @property
    def segment_counts(self) -> Tensor:
        """float64 `(3, S)`: numbers of NaN, +Inf and -Inf elements per segment."""
        return self.summary[1:] if self.kind is PLAIN else self.summary.narrow(0, 1, 3)

    @property
    def nan_count(self) -> Tensor:
        """int64 `(T,)`: number of NaN elements per tensor."""
        return self._row(self.counts, 0)

    @property
    def posinf_count(self) -> Tensor:
        """int64 `(T,)`: number of +Inf elements per tensor."""
        return self._row(self.counts, 1)

    @property
    def neginf_count(self) -> Tensor:
        """int64 `(T,)`: number of -Inf elements per tensor."""
        return self._row(self.counts, 2)

    @property
    def segment_norms(self) -> Tensor:
        """float64 `(S,)`: norm of the finite elements per segment."""
        values = self._row(self.summary, 0)
        return values if self.rooted else root(values, self.norm_type)

    @property
    def total_norm64(self) -> Tensor:
        """float64 `()`: norm of the finite elements of the whole model."""
        summary = self.summary
        if summary.numel() == 4:  # there is one segment
            value = summary[0, 0] if self.kind is PLAIN else summary.select(0, 0).select(0, 0)
            return value if self.rooted else root(value, self.norm_type)
        values = self._row(summary, 0)
        if self.rooted:
            return norm_of_norms(values, self.norm_type)
        whole = values.amax() if self.norm_type == math.inf and values.numel() else values.sum()
        return root(whole, self.norm_type)

    @property
    def total_norm(self) -> Tensor:
        """float32 `()` (float64 if any gradient is): norm of all finite elements."""
        norm = self.total_norm64
        return norm if self.float64 else norm.float()

    @property
    def found_nonfinite(self) -> Tensor:
        """float32 `()`: 1 if any element of the model is NaN or Inf, else 0."""
        return (self.segment_counts.sum() > 0).float()

    def _row(self, t: Tensor, i: int) -> Tensor:
        # Indexing would be faster, but needs the device, which may not exist for placeholders.
        return t[i] if self.kind is PLAIN else t.select(0, i)

    def culprits(self) -> list[Culprit]:
        """Returns `(name, nan, posinf, neginf)` per tensor with non-finite elements.

        Waits for the device. The result is empty for placeholders, which hold no numbers.
        """
        if not has_numbers(self.counts):
            return []
        counts = self.counts.cpu()
        bad = counts.sum(0).nonzero().squeeze(1).tolist()
        rows = counts[:, bad].T.tolist()
        return [(self.name(i), *row) for i, row in zip(bad, rows, strict=True)]

    def name(self, i: int) -> str:
        """Returns the name of tensor `i`."""
        return name_in(self.names, i)


def name_in(names: Sequence[str] | None, i: int) -> str:
    """Returns the name of tensor `i`; None instead of names: `parameter i`."""
    return names[i] if names is not None else f"parameter {i}"


def torch_total_norm(stats: GradStats) -> Tensor:
    """Returns the norm of the whole model as torch computes it, float64 `()`.

    The result is NaN or Inf if any element is.
    """
    on_host = stats.kind is PLAIN and stats.summary.device.type == "cpu"
    if on_host and not stats.segment_counts.any():
        return stats.total_norm64
    return propagated_norms(stats.total_norm64, stats.segment_counts.sum(1))
