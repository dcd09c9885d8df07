"""Losses on their way to a decision."""

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
"""The name of a loss that was given without one."""


Loss = Tensor | float | Mapping[str, Tensor | float]


def named_losses(loss: Loss | None, *, read: bool = False) -> dict[str, Tensor | float]:
    """What a user passes as `loss`, by name: detached scalars, numbers as they are.

    Args:
        loss: A scalar, or scalars by name; None: there is none.
        read: Whether those on a CPU become numbers, which makes all that follows cost half.

    Raises:
        TypeError: A loss is neither a real number nor a tensor of one.
        ValueError: A loss has more than one element, is too large for a float, or has the name of
            the gradient norm.
    """
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
                    f"{printable(str(name))} has shape {tuple(value.shape)}, but the guard needs "
                    "one number; reduce it first, for example with .mean()"
                )
            readable = read and value.is_cpu and has_numbers(value)
            value = value.item() if readable else value.detach().reshape(())
        scalars[str(name)] = value if type(value) is float else _real(name, value)
    return scalars


def _real(name: str, value: object) -> Tensor | float:
    """A number as a float, a tensor as it is; an error for what is not real."""
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
                f"{printable(str(name))} is beyond the largest float; pass float('inf') if "
                "that is what it means"
            ) from None
    raise TypeError(
        f"{printable(f'{name}={shown(value)}')} is a {kind}; pass a scalar tensor, a number, or a "
        "dict of them by name"
    )


class ObservedLosses:
    """Means of the losses of the micro-batches since the last step.

    Tensors stay where they are: a NaN or Inf in any micro-batch makes the sum, and so the mean,
    non-finite.
    """

    def __init__(self) -> None:
        self._batches: list[Mapping[str, Tensor | float]] = []
        self._given_back = False

    def observe(self, losses: Mapping[str, Tensor | float]) -> None:
        """Adds one micro-batch; the mapping is kept."""
        if self._given_back:  # those belong to a step that failed, and was not tried again
            self._batches, self._given_back = [], False
        copies = {  # the caller may use its buffers again
            name: value.to(torch.float64, copy=True)
            for name, value in losses.items()
            if isinstance(value, Tensor)
        }
        self._batches.append({**losses, **copies} if copies else losses)

    def take(self) -> Mapping[str, Tensor | float]:
        """The means by name, float64 `()` or numbers; the next micro-batch starts anew."""
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
        """The micro-batches so far, to be given back if the step fails."""
        return [*self._batches]

    def give_back(self, batches: list[Mapping[str, Tensor | float]]) -> None:
        """The micro-batches of a step that failed, for the case that it is tried again."""
        self._batches = batches
        self.keep_for_retry()

    def keep_for_retry(self) -> None:
        """The step failed: if the next one has losses of its own, those so far are dropped."""
        self._given_back = bool(self._batches)

    def keep(self) -> None:
        """The same step is tried again: its losses so far stay, whatever is added."""
        self._given_back = False


def stacked(losses: Mapping[str, Tensor | float], device: torch.device) -> Tensor:
    """float64 `(L,)` on a device."""
    values = list(losses.values())
    if set(map(type, values)) <= {float}:
        if device.type == "cpu":
            return torch.from_numpy(np.array(values, np.float64))  # a third of torch.tensor's time
        return numbers_on(values, device)  # type: ignore[arg-type]
    return torch.stack([_placed(value, device) for value in values])


def _placed(value: Tensor | float, device: torch.device) -> Tensor:
    """float64 `()` on a device."""
    if isinstance(value, Tensor):
        return moved(value.to(torch.float64), device)
    return numbers_on((value,), device)[0]
