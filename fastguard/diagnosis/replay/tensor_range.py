"""The range of a tensor's finite elements, and the number of non-finite elements."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Statistics on one tensor, as plain Python values.

    Attributes:
        name: The tensor's role in the operation or the model.
        dtype, shape: As printed by torch.
        min, max: Range of the finite elements; NaN if there are none.
        numel: Number of elements.
        nan, posinf, neginf, zeros: Number of elements that are NaN, +Inf, -Inf, exactly 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    min: float
    max: float
    numel: int
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0

    @staticmethod
    @torch.no_grad()
    def of(name: str, tensor: Tensor) -> TensorRange:
        """Computes the statistics in a few reads; synchronizes with the GPU."""
        x = as_real(tensor)
        finite = x.isfinite()
        values = x[finite]
        low, high = values.aminmax() if values.numel() else (math.nan, math.nan)
        return TensorRange(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            min=float(low),
            max=float(high),
            numel=x.numel(),
            nan=int(x.isnan().sum()),
            posinf=int((x == math.inf).sum()),
            neginf=int((x == -math.inf).sum()),
            zeros=int((x == 0).sum()),
        )

    @property
    def nonfinite(self) -> int:
        """Number of elements that are NaN or Inf."""
        return self.nan + self.posinf + self.neginf

    @property
    def absmax(self) -> float:
        """Largest magnitude of a finite element."""
        return max(abs(self.min), abs(self.max))

    @property
    def finite_share(self) -> float:
        """Share of finite elements; 1 for an empty tensor."""
        return 1.0 - self.nonfinite / self.numel if self.numel else 1.0

    def __str__(self) -> str:
        counts = (
            (self.nan, "NaN"),
            (self.posinf, "+Inf"),
            (self.neginf, "-Inf"),
            (self.zeros, "exactly 0"),
        )
        text = [f"{self.name}: {self.dtype} {list(self.shape)}"]
        if math.isnan(self.min):
            text.append("no finite element" if self.numel else "empty")
        else:
            text.append(
                f"from {self.min:.4g} to {self.max:.4g}, largest magnitude {self.absmax:.4g}"
            )
        if self.nonfinite:
            text.append(f"{100 * self.finite_share:.3g} % finite")
        text += [f"{n} {what}" for n, what in counts if n]
        return ", ".join(text)


def as_real(tensor: Tensor) -> Tensor:
    """Returns the elements in a dtype that every operation here supports."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        return tensor.float()
    return tensor
