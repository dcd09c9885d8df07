"""Lion, which steps by the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastguard.optim.contract import Algorithm
from fastguard.optim.optimizer import FusedOptimizer


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023) that clips, cleans or skips in one fused pass.

    Lion needs half the state of AdamW: one moment, `exp_avg`. Every weight moves by `lr`, so use a
    third to a tenth of the learning rate that you would use for AdamW, and three to ten times the
    weight decay.

    Args:
        params, maximize, master, rounding, state_dtype, reproducible, seed: As in `AdamW`.
        lr: Learning rate, >= 0; default 1e-4.
        betas: Decay rates of the update and of the moment, in [0, 1); default (0.9, 0.99).
        weight_decay: Decoupled weight decay, >= 0; default 0.

    Raises:
        TypeError, ValueError: An argument or a parameter is not supported.

    Example:
        >>> import torch, fastguard.optim
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.tensor([3.0, 0.1, -7.0])
        >>> fastguard.optim.Lion([weight], lr=0.25).step()
        >>> weight.data
        tensor([0.7500, 0.7500, 1.2500])
    """

    algorithm: ClassVar[Algorithm] = "lion"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[Any, Any] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **own: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, own)

    def counts_steps(self, group: Mapping[str, Any]) -> bool:
        """Whether the update depends on the step count, which only stochastic rounding needs."""
        return group["rounding"] == "stochastic"
