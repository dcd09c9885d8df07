"""SGD, with or without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastguard.optim.contract import Algorithm
from fastguard.optim.optimizer import FusedOptimizer


class SGD(FusedOptimizer):
    """SGD that clips, cleans or skips in one fused pass, and can keep exact float32 weights.

    A replacement for `torch.optim.SGD` with the same state keys. Each of the two optimizers can
    load state dicts of the other. With dampening or stochastic rounding, the state also contains
    `step`, which torch ignores.

    Args:
        params, maximize, master, rounding, state_dtype, reproducible, seed: As in `AdamW`.
        lr: Learning rate, >= 0; default 1e-3.
        momentum: Momentum factor, >= 0; default 0, without a momentum buffer.
        dampening: Fraction of the gradient that is not added to the momentum, from the second step
            of a parameter on; default 0.
        weight_decay: L2 penalty, >= 0: `weight_decay * weight` is added to the gradient; default 0.
        nesterov: Use Nesterov momentum, which needs momentum > 0 and no dampening; default False.

    Raises:
        TypeError, ValueError: An argument or a parameter is not supported.

    Example:
        >>> import torch, fastguard.optim
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> fastguard.optim.SGD([weight], lr=0.25, momentum=0.9).step()
        >>> weight.data
        tensor([0.7500, 0.7500, 0.7500])
    """

    algorithm: ClassVar[Algorithm] = "sgd"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, own)

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the hyper-parameters of a group, by their names in `contract.HYPER`."""
        keys = ("lr", "momentum", "dampening", "weight_decay")
        return {key: group[key] for key in keys}

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the name of the momentum buffer, if the group has momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def counts_steps(self, group: Mapping[str, Any]) -> bool:
        """Whether the update depends on the step count: dampening starts at the second step."""
        dampened = group["momentum"] != 0 and group["dampening"] != 0
        return dampened or group["rounding"] == "stochastic"
