"""Validates losses, averages micro-batches, and moves losses to the device of the decision."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from fastguard.errors.plain_text import printable, shown
from fastguard.gradients.tensor_kinds import has_numbers
from fastguard.gradients.transfer import moved, numbers_on
from fastguard.stages.spike_rules import GRAD_NORM

LOSS = "loss"
"""The name of a loss that was passed without a name."""


Loss = Tensor | float | Mapping[str, Tensor | float]


def named_losses(loss: Loss | None, *, read: bool = False) -> dict[str, Tensor | float]:
    """Returns the user's `loss` argument as a dict by name, with tensors detached.

    Args:
        loss: A scalar, or scalars by name; None: no loss.
        read: Whether to convert CPU tensors to floats, which halves the cost of the later stages.

    Raises:
        TypeError: A loss is neither a real number nor a real tensor.
        ValueError: A loss has several elements, is too large for a float, or is named like the
            gradient norm.
    """
    if loss is None:
        return {}
    named = loss if isinstance(loss, Mapping) else {LOSS: loss}
    scalars: dict[str, Tensor | float] = {}
    for name, value in named.items():
        if name == GRAD_NORM:
            raise ValueError(
                f"a loss is named {name!r}, which is reserved for the gradient norm; rename it"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"{printable(str(name))} has shape {tuple(value.shape)}, but the guard needs "
                    "one number; reduce it first, for example with .mean()"
                )
            readable = read and value.is_cpu and has_numbers(value)
            value = value.item() if readable else value.detach().reshape(())
        scalars[str(name)] = value if type(value) is float else _real(name, value)
    return scalars


def _real(name: str, value: object) -> Tensor | float:
    """Returns a number as a float and a real tensor unchanged; raises for anything else."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        if not (value.is_complex() or value.dtype is torch.bool):
            return value
        kind = "complex tensor" if value.is_complex() else "bool tensor"
    elif isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(
                f"{printable(f'{name}={shown(value)}')} is beyond the largest float; pass "
                "float('inf') if it is infinite"
            ) from None
    raise TypeError(
        f"{printable(f'{name}={shown(value)}')} is a {kind}; pass a scalar tensor, a number, or a "
        "dict of such values by name"
    )


class ObservedLosses:
    """Averages the losses of the micro-batches since the last step.

    Tensors stay on their device. NaN or Inf in any micro-batch makes the sum, and thus the mean,
    non-finite.
    """

    def __init__(self) -> None:
        self._batches: list[Mapping[str, Tensor | float]] = []
        self._given_back = False

    def observe(self, losses: Mapping[str, Tensor | float]) -> None:
        """Adds one micro-batch; keeps the mapping."""
        if self._given_back:  # discards losses of a failed step that was not retried
            self._batches, self._given_back = [], False
        copies = {  # copied, since the caller may reuse its buffers
            name: value.to(torch.float64, copy=True)
            for name, value in losses.items()
            if isinstance(value, Tensor)
        }
        self._batches.append({**losses, **copies} if copies else losses)

    def take(self) -> Mapping[str, Tensor | float]:
        """Returns the means by name, float64 `()` or numbers, and starts a new step."""
        batches, self._batches = self._batches, []
        self._given_back = False
        if len(batches) == 1:
            return batches[0]
        values: dict[str, list[Tensor | float]] = {}
        for losses in batches:
            for name, value in losses.items():
                values.setdefault(name, []).append(value)
        return {name: sum(given) / len(given) for name, given in values.items()}

    def kept(self) -> list[Mapping[str, Tensor | float]]:
        """Returns the micro-batches so far, for `give_back` if the step fails."""
        return [*self._batches]

    def give_back(self, batches: list[Mapping[str, Tensor | float]]) -> None:
        """Restores the micro-batches of a failed step, in case it is retried."""
        self._batches = batches
        self.keep_for_retry()

    def keep_for_retry(self) -> None:
        """Marks the step as failed: losses observed before the next step replace the kept ones."""
        self._given_back = bool(self._batches)

    def keep(self) -> None:
        """Marks the failed step as being retried: its losses stay, and new losses are added."""
        self._given_back = False


def stacked(losses: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    """Stacks losses into float64 `(L,)` on a device."""
    values = list(losses.values())
    if set(map(type, values)) <= {float}:
        if device.type == "cpu":
            # takes a third of torch.tensor's time
            return torch.from_numpy(np.array(values, np.float64))
        return numbers_on(values, device)  # type: ignore[arg-type]
    return torch.stack([_placed(value, device) for value in values])


def _placed(value: Tensor | float, device: torch.device) -> Tensor:
    """Moves a loss to a device as float64 `()`."""
    if isinstance(value, Tensor):
        return moved(value.to(torch.float64), device)
    return numbers_on((value,), device)[0]
