"""Float32 copies of the pieces of an update on a CPU, in memory that stays in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.gradients.vectors import in_memory_order
from fastguard.stages.formulas import SMALLEST_FACTOR


class Scratch:
    """Reusable memory for one piece at a time, in the dtype of the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._lines: dict[str, Tensor] = {}

    def line(self, name: str, n: int) -> Tensor:
        """Returns the memory of a name for n elements; its content is arbitrary."""
        held = self._lines.get(name)
        if held is None or held.numel() < n:
            held = self._lines[name] = torch.empty(n, dtype=self.dtype, device="cpu")
        return held[:n]

    def widened(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Returns the elements of tensors as one vector of the dtype; a view if possible."""
        flat = joined(tensors)
        return flat if flat.dtype is self.dtype else self.line(name, flat.numel()).copy_(flat)

    def copied(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Returns a copy of the elements of tensors as one vector of the dtype."""
        are_vectors = {t.dim() for t in tensors} == {1}
        if len(tensors) > 1 and are_vectors and tensors[0].dtype is self.dtype:
            # takes a third of the time that flattening takes
            return torch.cat(tensors, out=self.line(name, sum(map(Tensor.numel, tensors))))
        flat = joined(tensors)
        return self.line(name, flat.numel()).copy_(flat)


def joined(tensors: list[Tensor]) -> Tensor:
    """Returns the elements of tensors as one vector: a view of a single tensor, else a copy."""
    return in_memory_order(tensors[0]) if len(tensors) == 1 else flatten(tensors)


def scatter(of: list[Tensor], values: Tensor) -> None:
    """Copies a vector back to the tensors, in their dtype: the inverse of `joined`."""
    if len(of) == 1:
        in_memory_order(of[0]).copy_(values)
        return
    parts = zip(split(values, of), of, strict=True)
    torch._foreach_copy_(of, [v if t.dim() == 1 else v.view(t.shape) for v, t in parts])


def split(values: Tensor, of: list[Tensor]) -> list[Tensor]:
    """Returns the elements of each tensor, as views of a vector.

    `unflatten_dense_tensors` takes three times as long.
    """
    return list(values.split([t.numel() for t in of])) if len(of) > 1 else [values]


# Pieces of several tensors contain only contiguous tensors: see `pieces`.
flatten = torch._C._nn.flatten_dense_tensors  # type: ignore[attr-defined]


def scale(g: Tensor, multiplier: float, clean: bool, out: Tensor) -> None:
    """Cleans and scales like `reference.scaled`, but leaves the sign to the formula."""
    if clean:
        g = torch.nan_to_num(g.to(out.dtype), nan=0.0, posinf=0.0, neginf=0.0)
    if abs(multiplier) < SMALLEST_FACTOR:
        g = g.to(out.dtype) * SMALLEST_FACTOR
        multiplier /= SMALLEST_FACTOR
    if multiplier == 1.0:
        out.copy_(g)
    elif g.dtype is out.dtype:
        torch.mul(g, multiplier, out=out)
    else:  # copied first, since an operation on mixed dtypes takes three times as long
        out.copy_(g).mul_(multiplier)
