"""`Update`: all that one update of one bucket of tensors is given, by every backend.

An update has two parts. `advance` is one small computation per tensor: it counts the step and turns
hyper-parameters into the coefficients of `COEFFICIENTS`. The second part is elementwise: it reads
the gradient, the state and the weight once and writes state and weight once. The gradient is never
written. `fastguard.optim.reference` defines both parts, operation by operation.

Bytes per element, AdamW: 28 with everything in float32; 14 in bfloat16; 28 with bfloat16 weights
and gradients beside a float32 master and moments (26 with a remainder in place of the master).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["adamw", "adam", "sgd", "lion"]
Master = Literal["float32", "remainder"] | None
Rounding = Literal["nearest", "stochastic"]

HYPER: tuple[str, ...] = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "sign",  # -1.0 to maximize, else 1.0
    "seed",  # of stochastic rounding: an integer in [0, 2**32)
)
"""The columns of `Update.hyper`; an algorithm ignores those that it has no use for."""

N_COEFFICIENTS = 10
SIGN, KEY = 8, 9
"""Columns of every algorithm: the sign, and the 32-bit key of this step's noise (an integer)."""

_ADAM = ("beta1", "1 - beta1", "beta2", "1 - beta2", "eps", "lr / bc1", "1 / sqrt(bc2)")
COEFFICIENTS: Mapping[str, tuple[str, ...]] = {
    "adamw": (*_ADAM, "1 - lr * weight_decay"),
    "adam": (*_ADAM, "weight_decay"),
    "sgd": ("momentum", "1 - dampening", "weight_decay", "lr"),
    "lion": ("beta1", "1 - beta1", "beta2", "1 - beta2", "lr", "1 - lr * weight_decay"),
}
"""What `advance` writes for each tensor, by algorithm, in columns 0 to 7. `bc1` and `bc2` are the
bias corrections `1 - beta ** step`. The `1 - dampening` of SGD is 1 at the first step of a tensor.
"""

STATES: Mapping[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
}
"""The state tensors of each algorithm, in the order of their noise streams. `max_exp_avg_sq` is
there with `amsgrad`, `momentum_buffer` where momentum is not 0.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One update of T tensors that share a device, dtypes and options. All tensors are on it.

    The tensors of one position i (`parameters[i]`, `grads[i]`, `states[...][i]`, `masters[i]`) have
    the same shape. Their strides may differ; where they are the same and dense, memory order is as
    good as any: only stochastic rounding looks at an element's position, and it counts elements in
    the memory order of `parameters[i]`.

    Attributes:
        algorithm: Which formula.
        parameters: T tensors of one dtype: float32, float64, bfloat16 or float16. Written.
        grads: T tensors of one dtype, of which bfloat16 and float16 may differ from that of the
            parameters. Read only.
        states: By name, see `STATES`: T tensors of one dtype each, float32, bfloat16, float16, or
            float64 beside float64 parameters. Written.
        steps: T float32 tensors `()`, how many steps each tensor has taken. Written. Empty where
            nothing depends on it (Lion, and SGD without dampening, unless rounding is stochastic).
        hyper: float64 `(G, 9)`, see `HYPER`: one row per param group. Values may change at every
            step and must never be constants of a kernel.
        group_ids: T row numbers of `hyper`.
        multiplier: float64 `(S,)`: what gradients are multiplied by (clip coefficient times the
            inverse of the loss scale).
        segment_ids: T indices into `multiplier`.
        found_inf: float32 `()`: not 0 (NaN too): the step is skipped, and nothing is written, the
            step counters included.
        clean: float32 `()`: not 0: non-finite elements of gradients count as 0.
        master: What keeps the exact float32 weights: a tensor of `masters` in float32, or the 16
            bits that bfloat16 weights lack. None: `parameters` are the weights.
        masters: T tensors, float32 or int16; empty without a master. Written.
        rounding: How what is kept in bfloat16 is rounded: parameters without a master, and states.
            Nearest means to nearest even; a parameter with a remainder rounds half up in magnitude,
            so that both together are the float32 weight bit for bit.
        counters: T numbers: that of the first element of each tensor, counted through the whole
            optimizer, modulo 2**32. Empty unless rounding is stochastic.
        amsgrad: Divide by the largest second moment so far (Adam, AdamW).
        nesterov: Nesterov momentum (SGD).
        reproducible: IEEE operations in the order of the reference, without fused multiply-add, so
            that every device gives the same bits. False: a backend may be a few ulps off.
    """

    algorithm: Algorithm
    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Mapping[str, Sequence[Tensor]]
    steps: Sequence[Tensor]
    hyper: Tensor
    group_ids: Sequence[int]
    multiplier: Tensor
    segment_ids: Sequence[int]
    found_inf: Tensor
    clean: Tensor
    master: Master = None
    masters: Sequence[Tensor] = ()
    rounding: Rounding = "nearest"
    counters: Sequence[int] = ()
    amsgrad: bool = False
    nesterov: bool = False
    reproducible: bool = False

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 for float64 parameters, else float32."""
        return torch.float64 if self.parameters[0].dtype is torch.float64 else torch.float32
