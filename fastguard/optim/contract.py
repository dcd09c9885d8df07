"""`Update`: the input of every backend, for one bucket of tensors.

An update has two parts. The first, `advance`, is one small computation per tensor: it counts the
step and computes `COEFFICIENTS` from the hyper-parameters. The second is elementwise: it reads
gradient, state and weight once, and writes state and weight once. The gradient is never written.
`fastguard.optim.reference` defines both parts, operation by operation.

Bytes per element, AdamW: 28 with everything in float32; 14 in bfloat16; 28 with bfloat16 weights
and gradients, and a float32 master and moments (26 with a remainder in place of the master).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastguard.stages.agc import UnitLimits

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
    "seed",  # seed of stochastic rounding, an integer in [0, 2**32)
    "spike_threshold",  # 0 means no spike-aware clipping
    "momentum_reset",  # steps between resets of the moments; 0 means never
    "reset_warmup",  # steps of warm-up after a reset
)
"""The columns of `Update.hyper`; an algorithm ignores columns that it does not use."""

N_COEFFICIENTS = 13
SIGN, KEY, SPIKE, RESET, SUM_SCALE = 8, 9, 10, 11, 12
"""The other columns:

SIGN       -1.0 to maximize, else 1.0
KEY        the 32-bit noise key of the step, an integer
SPIKE      `spike_threshold` of this step; infinity if nothing is clipped
RESET      1.0 if the moments restart from 0 at this step, else 0.0
SUM_SCALE  what update clipping multiplies the terms of its sum by, before it truncates them
"""

_ADAM = ("beta1", "1 - beta1", "beta2", "1 - beta2", "eps", "lr / bc1", "1 / sqrt(bc2)")
COEFFICIENTS: Mapping[str, tuple[str, ...]] = {
    "adamw": (*_ADAM, "1 - lr * weight_decay"),
    "adam": (*_ADAM, "weight_decay"),
    "sgd": ("momentum", "1 - dampening", "weight_decay", "lr"),
    "lion": ("beta1", "1 - beta1", "beta2", "1 - beta2", "lr", "1 - lr * weight_decay"),
}
"""The coefficients that `advance` writes for each tensor, by algorithm, in columns 0 to 7.

`bc1` and `bc2` are the bias corrections `1 - beta ** step`. For SGD, `1 - dampening` is 1 at the
first step of a tensor. After a reset of the moments, `lr / bc1` is multiplied by the warm-up.
"""

STATES: Mapping[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
}
"""The state tensors of each algorithm, in the order of their noise streams. `max_exp_avg_sq` exists
only with `amsgrad`, and `momentum_buffer` only if momentum is not 0.
"""

STATISTICS = ("squares of weights", "squares of changes", "non-finite weights")
"""The columns of `Update.statistics`. The first two are sums of squares, over finite elements, of
the exact weights before the step, and of their changes (new minus old, in the dtype of the
arithmetic). Exact weights are the `masters`, or with a remainder both halves together, or else the
`parameters`. The third is the number of elements of `parameters` that are NaN or infinite after the
step.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One update of T tensors that share a device, dtypes and options.

    Tensors at the same position i (`parameters[i]`, `grads[i]`, `states[...][i]`, `masters[i]`)
    have the same shape, but may have different strides. If their strides are equal and dense, a
    backend may process elements in any order: only stochastic rounding depends on the position of
    an element, and it counts elements in the memory order of `parameters[i]`.

    Attributes:
        algorithm: The algorithm.
        parameters: T tensors of one dtype: float32, float64, bfloat16 or float16. Written.
        grads: T tensors of one dtype; bfloat16 and float16 gradients may differ in dtype from the
            parameters. Read only.
        states: By name, see `STATES`: T tensors of one dtype each, float32, bfloat16 or float16, or
            float64 for float64 parameters. Written.
        steps: T float32 tensors `()`, the number of steps each tensor has taken. Written. Empty if
            the update does not depend on it (Lion, and SGD without dampening, unless rounding is
            stochastic).
        hyper: float64 `(G, 12)`, see `HYPER`: one row per param group. Values may change at every
            step, so kernels must not treat them as constants.
        group_ids: T row numbers of `hyper`.
        multiplier: float64 `(S,)`: factors of the gradients (clip coefficient times the inverse of
            the loss scale).
        segment_ids: T indices into `multiplier`.
        found_inf: float32 `()`; if it is not 0 (or NaN), the step is skipped: nothing is written,
            including the step counters.
        clean: float32 `()`; if it is not 0, non-finite gradient elements count as 0.
        master: What keeps the exact float32 weights: `masters` in float32, or the 16 bits that
            bfloat16 weights lack. None: `parameters` are the weights.
        masters: T tensors, float32 or int16; empty without a master. Written.
        rounding: How values are rounded to 16 bits: states, and parameters without a master.
            Nearest means ties to even. Parameters with a remainder are rounded with ties away from
            zero, so that parameter and remainder together equal the float32 weight bit for bit.
        counters: T numbers: the index of the first element of each tensor among all elements of the
            optimizer, modulo 2**32. Empty unless rounding is stochastic.
        amsgrad: Divide by the largest second moment so far (Adam, AdamW).
        nesterov: Use Nesterov momentum (SGD).
        reproducible: Use IEEE operations in the order of the reference, without fused multiply-add,
            so that every device gives the same bits. Otherwise, a backend may be a few ulps off.
        spike_aware: Use the columns `spike_threshold` and `momentum_reset` of `hyper` (AdamW).
        update_clipping: Divide the learning rate of a tensor by the root mean square of its update
            if that is above 1 (AdamW). Not together with `units`.
        units: Limits of the units of the gradients; None: no such limits. The norm of a unit is
            computed from `parameters`, not from `masters`.
        unit_counts: T numbers of units, or rows, of each tensor; 0: not limited. The rows of a
            limited parameter are contiguous and consecutive in memory. Empty without `units`.
        positions: T positions among all parameters of the optimizer; empty without `units`.
        statistics: float64 `(T, 3)`, zeros: receives the `STATISTICS` of each tensor, unless the
            step is skipped. None: they are not computed.
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
    spike_aware: bool = False
    update_clipping: bool = False
    units: UnitLimits | None = None
    unit_counts: Sequence[int] = ()
    positions: Sequence[int] = ()
    statistics: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 for float64 parameters, else float32."""
        return torch.float64 if self.parameters[0].dtype is torch.float64 else torch.float32
