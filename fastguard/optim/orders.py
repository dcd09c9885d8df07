"""`Orders`: how a step treats its gradients, as decided by a loss scaler or a guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.stages.agc import UnitLimits


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """The verdict on a step, as needed by the update.

    Attributes:
        multiplier: float64 `(S,)`: factors of the gradients.
        found_inf: float32 `()`; if it is not 0, the step is skipped.
        clean: float32 `()`; if it is not 0, non-finite gradient elements count as 0.
        segments: Index into `multiplier` of each parameter of the optimizer, in the order of the
            param groups; None: index 0 for all.
        units: Limits of the units of the gradients; None: no such limits.
    """

    multiplier: Tensor
    found_inf: Tensor
    clean: Tensor
    segments: Sequence[int] | None = None
    units: UnitLimits | None = None

    @staticmethod
    def of_scaler(
        grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
    ) -> Orders:
        """Creates orders from the two attributes that `GradScaler` sets on an optimizer.

        Args:
            grad_scale: float32 `()`: divisor of the gradients; None: 1.
            found_inf: float32 `()`: a sum over devices, which is above 0 after an overflow; None:
                0.
            device: Device of the defaults.
        """
        zero = torch.zeros((), device=device)
        multiplier = (
            torch.ones(1, dtype=torch.float64, device=device)
            if grad_scale is None
            else grad_scale.double().reciprocal().reshape(1)
        )
        return Orders(multiplier, zero if found_inf is None else found_inf, zero)
