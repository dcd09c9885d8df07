"""torch's fused CPU kernels of the algorithms, and the updates that they compute exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastguard.optim.contract import Update

HALF = (torch.bfloat16, torch.float16)


def is_equivalent(update: Update, names: Sequence[str]) -> bool:
    """Whether torch's fused kernel, used directly on the tensors, computes the same result."""
    dtype = update.parameters[0].dtype
    if update.algorithm == "sgd" and dtype in HALF:
        # torch 2.13 combines the wrong halves of vectors, with errors as large as the step
        return False
    if dtype is torch.float16:
        return False  # torch rounds the second moment before it uses it, so that it underflows
    return (
        update.algorithm != "lion"
        and not (update.reproducible or update.spike_aware or update.update_clipping)
        and update.master is None
        and update.rounding == "nearest"
        and all(update.states[name][0].dtype is dtype for name in names)
        and (update.grads[0].dtype is dtype or dtype not in HALF)
    )


class Fused:
    """torch's fused kernel of an algorithm, with the hyper-parameters of one param group."""

    def __init__(self, update: Update, hyper: dict[str, float], step: Any) -> None:
        self._algorithm, self._amsgrad = update.algorithm, update.amsgrad
        common: dict[str, Any] = {
            "lr": hyper["lr"],
            "weight_decay": hyper["weight_decay"],
            "maximize": hyper["sign"] < 0.0,
        }
        if update.algorithm == "sgd":
            first = isinstance(step, Tensor) and step.item() == 1.0
            self._options = common | {
                "momentum": hyper["momentum"],
                "dampening": hyper["dampening"],
                "nesterov": update.nesterov,
                "is_first_step": first,
            }
            return
        self._call = torch._fused_adamw_ if update.algorithm == "adamw" else torch._fused_adam_
        self._options = common | {
            "beta1": hyper["beta1"],
            "beta2": hyper["beta2"],
            "eps": hyper["eps"],
            "amsgrad": update.amsgrad,
        }

    def __call__(
        self,
        parameters: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        if self._algorithm == "sgd":
            buffers = states[0] if states else []
            torch._fused_sgd_(parameters, grads, buffers, **self._options)
            return
        largest = states[2] if self._amsgrad else []
        self._call(parameters, grads, states[0], states[1], largest, steps, **self._options)
