"""`RunningStatistics`: what a forward pass leaves in a model, to be taken back after a bad one."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.integrations.clipping import was_skipped
from fastguard.optimizer import GuardedOptimizer

log = logging.getLogger("fastguard")


class RunningStatistics:
    """The buffers of a model, such as BatchNorm's running mean and variance, as they were.

    A forward pass on a bad batch writes NaN into them long before any optimizer can decline. One
    copy of all buffers, kept on their device; nothing waits.

    Args:
        model: Its buffers are on one device, and stay the tensors they are.

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
        self._judged = [i for i, b in enumerate(self._buffers) if _is_judged(b)]

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

    @torch.no_grad()
    def mend(self) -> int:
        """Puts back the buffers that are not finite: a large activation whose loss and gradients
        were finite can still overflow a variance. Waits for a GPU.

        Returns:
            How many there were.
        """
        if not self._judged:
            return 0
        norms = torch._foreach_norm([self._buffers[i] for i in self._judged], math.inf)
        bad = (~torch.stack([n.double() for n in norms]).isfinite()).nonzero().flatten().tolist()
        for i in (self._judged[k] for k in bad):
            self._buffers[i].copy_(self._kept[i])
        if bad:
            log.warning("%d buffers of the model had become NaN or Inf: put back", len(bad))
        return len(bad)

    def follow(self, optimizer: GuardedOptimizer) -> None:
        """Puts back after every skipped step of `optimizer`, keeps after the others and a load.

        Reads each verdict on the host, which waits for a GPU; a model without buffers needs none.
        """
        if not self._buffers:
            return

        def after_step(*_: Any) -> None:
            if was_skipped(optimizer):
                self.put_back()
            else:
                self.mend()
                self.keep()

        optimizer.register_step_post_hook(after_step)
        optimizer.register_load_state_dict_post_hook(lambda _: self.keep())


def _is_judged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.numel() > 0  # the rest is finite by nature
