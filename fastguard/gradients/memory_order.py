"""Views of tensors with dimensions in memory order, for example of channels_last tensors."""

from __future__ import annotations

from torch import Tensor


def in_memory_order(t: Tensor) -> Tensor:
    """Returns a view with descending strides; contiguous if the memory has no gaps."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def flat(t: Tensor) -> Tensor:
    """Returns the elements of a tensor as a vector, in memory order to avoid a copy if possible."""
    if t.dim() == 1:
        return t
    return (t if t.is_contiguous() else in_memory_order(t)).reshape(-1)
