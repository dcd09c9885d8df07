"""What an update is told about its gradients: by a loss scaler, or by a guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """The verdict on a step, as the update needs it.

    Attributes:
        multiplier: float64 `(S,)`, what gradients are multiplied by.
        found_inf: float32 `()`, not 0: the step is skipped.
        clean: float32 `()`, not 0: non-finite elements of gradients count as 0.
        segments: The index into `multiplier` of each parameter of the optimizer, group after group;
            None: all have index 0.
    """

    multiplier: Tensor
    found_inf: Tensor
    clean: Tensor
    segments: Sequence[int] | None = None

    @staticmethod
    def of_scaler(
        grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
    ) -> Orders:
        """Those of `GradScaler`, which sets two attributes on the optimizer that it steps.

        Args:
            grad_scale: float32 `()`, what gradients are to be divided by; None: nothing.
            found_inf: float32 `()`, a sum over devices, > 0 after an overflow; None: none.
            device: Where to make what is missing.
        """
        zero = torch.zeros((), device=device)
        multiplier = (
            torch.ones(1, dtype=torch.float64, device=device)
            if grad_scale is None
            else grad_scale.double().reciprocal().reshape(1)
        )
        return Orders(multiplier, zero if found_inf is None else found_inf, zero)
