"""Adam and AdamW, which differ only in how they apply weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastguard.optim.contract import Algorithm
from fastguard.optim.optimizer import FusedOptimizer
from fastguard.optim.options import OF_ADAMW, OWN


class Adam(FusedOptimizer):
    """Adam that clips, cleans or skips in one fused pass, and can keep exact float32 weights.

    A replacement for `torch.optim.Adam` with the same state keys. Each of the two optimizers can
    load state dicts of the other.

    Args:
        params, lr, betas, eps, amsgrad, maximize, master, rounding, state_dtype: As in `AdamW`.
        reproducible, seed: As in `AdamW`.
        weight_decay: L2 penalty, >= 0: `weight_decay * weight` is added to the gradient; default 0.

    Raises:
        TypeError, ValueError: An argument or a parameter is not supported.

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
            "decoupled_weight_decay": self.algorithm == "adamw",
        }
        super().__init__(params, defaults, own)


class AdamW(Adam):
    """AdamW that clips, cleans or skips in one fused pass, and can keep exact float32 weights.

    A replacement for `torch.optim.AdamW` with the same state keys. Each of the two optimizers can
    load state dicts of the other.

    Args:
        params: Parameters, `(name, parameter)` pairs or param groups, as in torch.
        lr: Learning rate, >= 0; default 1e-3. A tensor is read on its device.
        betas: Decay rates of the two moments, in [0, 1); default (0.9, 0.999).
        eps: Added to the denominator, >= 0; default 1e-8.
        weight_decay: Decoupled weight decay, >= 0; default 1e-2.
        amsgrad: Divide by the largest second moment so far; default False.
        maximize: Maximize the objective instead of minimizing it; default False.
        master: How exact float32 weights are kept for 16-bit parameters: `"float32"` keeps a copy,
            4 bytes per element, for bfloat16 or float16; `"remainder"` keeps the 16 bits that
            bfloat16 lacks, 2 bytes per element; None, the default, keeps none.
        rounding: How values are rounded to 16 bits (states, and weights without a master):
            `"nearest"`, the default; or `"stochastic"`, which rounds up or down with probabilities
            that are proportional to the distances.
        state_dtype: Dtype of the moments: `torch.float32`, `torch.bfloat16` or `torch.float16`;
            None, the default, uses float32 with a master, and the parameter's dtype without a
            master.
        reproducible: Use IEEE operations in a fixed order, which give the same bits on every
            device; default False.
        seed: Seed of stochastic rounding, in [0, 2**32); default 0.
        update_clipping: Divide the learning rate of a tensor by the root mean square of
            `grad / sqrt(second moment)` where that is above 1, as StableAdamW does (Wortsman et al.
            2023); default False.
        spike_threshold: Limit the magnitude of each gradient element to
            `sqrt(spike_threshold * second moment)`, as SPAM does (Huang et al. 2025) with 5000;
            default None: no limit.
        momentum_reset: Restart the moments from 0 each time a parameter has taken this many steps,
            as SPAM does with 500; default None: never.
        reset_warmup: Number of steps, < `momentum_reset`, in which the learning rate rises again
            after a reset; default 150.

    Raises:
        TypeError, ValueError: An argument or a parameter is not supported.

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
    own_settings: ClassVar[Mapping[str, Any]] = {**OWN, **OF_ADAMW}

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
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, **own)
