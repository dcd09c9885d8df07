"""AdamW and Adam, which differ in where the weight decay goes."""

from __future__ import annotations

from typing import Any, ClassVar

from fastguard.optim.contract import Algorithm
from fastguard.optim.optimizer import FusedOptimizer


class AdamW(FusedOptimizer):
    """AdamW whose one touch of the weights obeys a verdict and can keep exact weights.

    As `torch.optim.AdamW`, with the same state keys; state dicts load both ways.

    Args:
        params: As in torch: parameters, `(name, parameter)` pairs or param groups.
        lr: Learning rate, >= 0; default 1e-3. A tensor is read on its device.
        betas: Decay rates of the two moments, in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: Decoupled from the gradient, >= 0; default 1e-2.
        amsgrad: Divide by the largest second moment so far.
        maximize: Step uphill.
        master: How exact float32 weights are kept behind 16-bit ones: `"float32"`, a copy of 4
            bytes per element beside bfloat16 or float16; `"remainder"`, the 16 bits that bfloat16
            lacks; None: not at all.
        rounding: `"nearest"`, or `"stochastic"` for what is kept in bfloat16 (weights without a
            master, and states): up or down with the probability of the distance.
        state_dtype: Of the moments: `torch.float32`, `torch.bfloat16` or `torch.float16`; None:
            that of the parameter, or float32 beside a master.
        reproducible: IEEE operations in a fixed order: the same bits on every device.
        seed: Of stochastic rounding, in [0, 2**32).

    Raises:
        TypeError, ValueError: An argument or a parameter is not served.

    Example:
        >>> import torch, fastguard.optim
        >>> model = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
        >>> optimizer = fastguard.optim.AdamW(model.parameters(), master="remainder")
        >>> model(torch.ones(4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'remainder', 'step']
    """

    algorithm: ClassVar[Algorithm] = "adamw"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, own)


class Adam(FusedOptimizer):
    """Adam whose one touch of the weights obeys a verdict and can keep exact weights.

    As `torch.optim.Adam`, with the same state keys; state dicts load both ways.

    Args:
        params, lr, betas, eps, amsgrad, maximize, master, rounding, state_dtype: As in `AdamW`.
        reproducible, seed: As in `AdamW`.
        weight_decay: An L2 penalty: added to the gradient times the weight; default 0.

    Raises:
        TypeError, ValueError: An argument or a parameter is not served.

    Example:
        >>> import torch, fastguard.optim
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> fastguard.optim.Adam([weight], lr=0.5).step()
        >>> weight.data
        tensor([0.5000, 0.5000, 0.5000])
    """

    algorithm: ClassVar[Algorithm] = "adam"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": False,
        }
        super().__init__(params, defaults, own)
