"""`RunningStatistics`: what a forward pass leaves in a model, taken back when its step is skipped."""

from __future__ import annotations

import torch
from torch import nn


class RunningStatistics:
    """The buffers of a model, such as BatchNorm's running mean and variance, as they were.

    A forward pass on a bad batch writes NaN into them long before any optimizer can decline. One
    copy of all buffers, kept on their device; nothing waits.

    Args:
        model: Its buffers must stay the same tensors.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> statistics = RunningStatistics(norm)
        >>> _ = norm(torch.full((4, 2), float("nan")))
        >>> statistics.put_back()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers the buffers as they are now."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the buffers what they were when they were last kept."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
