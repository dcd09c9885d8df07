"""Losses on their way to a decision."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastguard.rules import GRAD_NORM
from fastguard.transfer import moved

LOSS = "loss"
"""The name of a loss that was given without one."""


def named_losses(loss: Tensor | float | Mapping[str, Tensor | float] | None) -> dict[str, Tensor]:
    """What a user passes as `loss`, as detached scalars by name.

    Raises:
        TypeError: A loss is neither a tensor nor a number.
        ValueError: A loss has more than one element, or the name of the gradient norm.
    """
    if loss is None:
        return {}
    named = loss if isinstance(loss, Mapping) else {LOSS: loss}
    scalars = {}
    for name, value in named.items():
        if name == GRAD_NORM:
            raise ValueError(
                f"a loss is called {name!r}, which is the gradient norm's own signal; rename it"
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}={value!r} is a {type(value).__name__}; pass a scalar tensor, a number, "
                "or a dict of them by name"
            )
        if value.numel() != 1:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but the guard needs one number; "
                "reduce it first, for example with .mean()"
            )
        value = value.detach()
        scalars[str(name)] = value if value.dim() == 0 else value.reshape(())
    return scalars


class ObservedLosses:
    """Means of the losses of the micro-batches since the last step.

    Kept as sums on the device of each loss, on a CPU as numbers, which cost a fifth: a NaN or Inf
    in any micro-batch makes the sum, and so the mean, non-finite.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch."""
        for name, value in losses.items():
            if value.device.type == "cpu":
                wide = float(value)
            else:
                wide = value.to(torch.float64, copy=True)  # the caller may use its buffer again
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Tensor | float]:
        """The means by name, float64 `()` or numbers; the next micro-batch starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


def stacked(losses: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    """float64 `(L,)` on a device."""
    values = list(losses.values())
    if set(map(type, values)) <= {float}:
        numbers = torch.from_numpy(np.array(values))  # half the time of torch.tensor
        return numbers if device.type == "cpu" else moved(numbers, device)
    wide = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    return torch.stack([moved(value, device) for value in wide])
