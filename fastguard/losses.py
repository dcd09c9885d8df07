"""Losses on their way to a decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fastguard.rules import GRAD_NORM
from fastguard.transfer import moved

LOSS = "loss"
"""The name of a loss that was given without one."""


Loss = Tensor | float | Mapping[str, Tensor | float]


def named_losses(loss: Loss | None) -> dict[str, Tensor | float]:
    """What a user passes as `loss`, by name: detached scalars, numbers as they are.

    Raises:
        TypeError: A loss is neither a tensor nor a number.
        ValueError: A loss has more than one element, or the name of the gradient norm.
    """
    return _by_name(loss, _detached)


def read_losses(loss: Loss | None) -> dict[str, Tensor | float]:
    """The same, but those on a CPU are read, which makes all that follows cost half."""
    return _by_name(loss, lambda value: value.item() if value.is_cpu else _detached(value))


def _detached(value: Tensor) -> Tensor:
    return value.detach().reshape(())


def _by_name(
    loss: Loss | None, scalar: Callable[[Tensor], Tensor | float]
) -> dict[str, Tensor | float]:
    if loss is None:
        return {}
    named = loss if isinstance(loss, Mapping) else {LOSS: loss}
    scalars: dict[str, Tensor | float] = {}
    for name, value in named.items():
        if name == GRAD_NORM:
            raise ValueError(
                f"a loss is called {name!r}, which is the gradient norm's own signal; rename it"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, but the guard needs one number; "
                    "reduce it first, for example with .mean()"
                )
            value = scalar(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"{name}={value!r} is a {type(value).__name__}; pass a scalar tensor, a number, "
                "or a dict of them by name"
            )
        scalars[str(name)] = value if isinstance(value, Tensor) else float(value)
    return scalars


class ObservedLosses:
    """Means of the losses of the micro-batches since the last step.

    Kept as sums where each loss is: a NaN or Inf in any micro-batch makes the sum, and so the mean,
    non-finite.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def observe(self, losses: Mapping[str, Tensor | float]) -> None:
        """Adds one micro-batch."""
        sums, counts = self._sums, self._counts
        for name, value in losses.items():
            if isinstance(value, Tensor):
                value = value.to(torch.float64, copy=True)  # the caller may use its buffer again
            if name in sums:
                sums[name] = sums[name] + value  # not in place: it may be an inference tensor
                counts[name] += 1
            else:
                sums[name], counts[name] = value, 1

    def take(self) -> dict[str, Tensor | float]:
        """The means by name, float64 `()` or numbers; the next micro-batch starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


def stacked(losses: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    """float64 `(L,)` on a device."""
    values = list(losses.values())
    if set(map(type, values)) <= {float}:
        numbers = torch.from_numpy(np.array(values, np.float64))  # a third of torch.tensor's time
        return numbers if device.type == "cpu" else moved(numbers, device)
    wide = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    return torch.stack([moved(value, device) for value in wide])
