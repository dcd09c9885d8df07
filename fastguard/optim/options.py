"""Checks the arguments of the optimizers: the settings of param groups, and their parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastguard.errors import nearest
from fastguard.errors.checked_numbers import count_of, number_of
from fastguard.errors.plain_text import shown
from fastguard.gradients.tensor_kinds import is_wrapped
from fastguard.ranks.dtensors import is_dtensor
from fastguard.ranks.plain_shards import is_managed

MASTERS = (None, "float32", "remainder")
ROUNDINGS = ("nearest", "stochastic")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
OWN: dict[str, Any] = {
    "master": None,
    "rounding": "nearest",
    "state_dtype": None,
    "reproducible": False,
    "seed": 0,
}
"""The settings that torch's optimizers lack, with their defaults."""

OF_ADAMW: dict[str, Any] = {
    "update_clipping": False,
    "spike_threshold": None,
    "momentum_reset": None,
    "reset_warmup": 150,
}
"""The settings that only `AdamW` has in addition, with their defaults."""

SPIKE_GRACE = 20
"""Spikes are clipped from the step with this number on, and after a reset from this number of steps
on, because the second moment of fewer gradients is unreliable. The code of SPAM calls this number
`grad_accu_steps`.
"""

OF_TORCH: dict[str, Any] = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
}
"""Settings of torch's optimizers, kept in param groups so that torch can load the state dicts."""

_WHY_NOT = {
    "foreach": "one fused pass updates every tensor, so there are no variants",
    "fused": "the update is always fused",
    "capturable": "the step can always be captured in a CUDA graph",
    "differentiable": "a fused update cannot be differentiated; use the optimizer of torch.optim",
}


def refuse_unknown(kind: str, unknown: Collection[str], known: Collection[str]) -> None:
    """Raises a TypeError for keyword arguments that an optimizer does not take."""
    for key in unknown:
        why = _WHY_NOT.get(key)
        hint = f": {why}; leave it out" if why else nearest(key, known)
        raise TypeError(f"fastguard.optim.{kind} takes no argument {key!r}{hint}")


def check_group(group: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises a TypeError or ValueError for settings or parameters that are not supported.

    Args:
        group: A param group with all its settings.
        names: Names of its parameters, for errors.
    """
    _check_numbers(group)
    for key, choices in (("master", MASTERS), ("rounding", ROUNDINGS)):
        if group[key] not in choices:
            raise ValueError(
                f"{key}={shown(group[key])} is unknown; use one of {', '.join(map(repr, choices))}"
            )
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype={shown(group['state_dtype'])} is not supported; use None, "
            "torch.float32, torch.bfloat16 or torch.float16"
        )
    count_of("seed", group["seed"], 0, 2**32 - 1)
    if "momentum_reset" in group:
        _check_spike_settings(group)
    for name, p in zip(names, group["params"], strict=True):
        _check_parameter(group, name, p)


def _check_numbers(group: Mapping[str, Any]) -> None:
    for key in ("lr", "eps", "weight_decay", "momentum"):
        # the comparison is False for NaN
        if key in group and not number_of(key, group[key]) >= 0.0:
            raise ValueError(f"{key}={shown(group[key])} must be a number >= 0")
    betas = group.get("betas", ())
    if "betas" in group and (not isinstance(betas, tuple | list) or len(betas) != 2):
        raise ValueError(f"betas={shown(betas)} must be two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not 0.0 <= number_of(f"betas[{i}]", beta) < 1.0:
            raise ValueError(f"betas[{i}]={shown(beta)} must be in [0, 1)")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening=0, but momentum={group['momentum']} "
            f"and dampening={group['dampening']}"
        )


def _check_spike_settings(group: Mapping[str, Any]) -> None:
    threshold, reset = group["spike_threshold"], group["momentum_reset"]
    if not isinstance(group["update_clipping"], bool):
        raise TypeError(f"update_clipping={shown(group['update_clipping'])} must be True or False")
    if threshold is not None and not 0.0 < number_of("spike_threshold", threshold) < math.inf:
        raise ValueError(
            f"spike_threshold={shown(threshold)} must be None or a finite number > 0, such as 5000"
        )
    warmup = count_of("reset_warmup", group["reset_warmup"], 0)
    if reset is None:
        return
    count_of("momentum_reset", reset, 1, optional=True)
    if warmup >= reset:
        raise ValueError(
            f"reset_warmup={warmup} must be shorter than momentum_reset={reset}, or the learning "
            "rate would never recover; use a shorter warm-up, or a larger momentum_reset"
        )
    if threshold is not None and reset <= SPIKE_GRACE:
        raise ValueError(
            f"momentum_reset={reset} leaves no step for spike_threshold={shown(threshold)}: "
            f"nothing is clipped in the {SPIKE_GRACE} steps after a reset; use a larger "
            "momentum_reset"
        )


def is_spike_aware(group: Mapping[str, Any]) -> bool:
    """Whether a param group clips spikes or resets its moments."""
    return group.get("spike_threshold") is not None or group.get("momentum_reset") is not None


def _check_parameter(group: Mapping[str, Any], name: str, p: Tensor) -> None:
    master, dtype = group["master"], p.dtype
    elsewhere = "put it in a separate param group with"
    if is_wrapped(p) and not is_dtensor(p):
        raise TypeError(
            f"{name} is a {type(p).__name__}, which wraps other tensors; fastguard.optim reads "
            "memory directly, so use an optimizer of torch.optim for this parameter"
        )
    if not dtype.is_floating_point:
        raise TypeError(
            f"{name} is {dtype}; fastguard.optim requires real floating-point parameters; use an "
            "optimizer of torch.optim for this one"
        )
    if master == "remainder" and dtype is not torch.bfloat16:
        raise ValueError(
            f"master='remainder' keeps the 16 bits that bfloat16 weights lack, but {name} is "
            f"{dtype}; {elsewhere} master={_master_for(dtype)!r}"
        )
    if master == "float32" and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"master='float32' keeps float32 copies of 16-bit weights, but {name} is {dtype}; "
            f"{elsewhere} master=None"
        )
    if dtype is torch.float64 and group["state_dtype"] is not None:
        raise ValueError(
            f"state_dtype={group['state_dtype']} requires parameters of at most 32 bits, but "
            f"{name} is {dtype}; {elsewhere} state_dtype=None"
        )
    if group.get("update_clipping") and (is_dtensor(p) or is_managed(p)):
        what = "a part of a flat tensor of FullyShardedDataParallel or DeepSpeed"
        if is_dtensor(p):
            what = "a DTensor, of which this rank holds only a part"
        raise ValueError(
            f"update_clipping=True needs the whole of each tensor, but {name} is {what}; "
            f"{elsewhere} update_clipping=False"
        )
    rounded = dtype.itemsize == 2 and master is None
    if group["rounding"] == "stochastic" and not rounded:
        if state_dtype_of(group, p).itemsize != 2:
            raise ValueError(
                f"rounding='stochastic' rounds only to 16 bits, but {name} is {dtype}"
                f"{'' if master is None else ' with an exact master'}, and its state has more "
                f"bits; "
                f"{elsewhere} rounding='nearest'"
            )


def _master_for(dtype: torch.dtype) -> str | None:
    return "float32" if dtype is torch.float16 else None


def state_dtype_of(group: Mapping[str, Any], p: Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's state.

    With a master, the default is float32, since training with float32 accuracy needs float32
    moments. Without a master, it is the dtype of the parameter.
    """
    if group["state_dtype"] is not None:
        return group["state_dtype"]
    return p.dtype if group["master"] is None else torch.float32
