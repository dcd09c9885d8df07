"""Checks which optimizers and parameters `flat_parameters=True` supports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastguard.functional.flat_layout import check_flat, dtype_of_grad
from fastguard.gradients.buckets import name_of
from fastguard.gradients.tensor_kinds import PLAIN_TYPES
from fastguard.ranks.dtensors import is_dtensor
from fastguard.ranks.plain_shards import is_managed

# These optimizers update element by element, and their state consists of a step count and tensors
# with the shape of the parameter. So one long tensor gives the same result as many short ones.
SERVED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
DEVICES = ("cpu", "cuda")  # devices on which torch has fused kernels and flat parameters are tested


def check_flat_optimizer(optimizer: Optimizer) -> None:
    """Raises a TypeError for an optimizer that is not supported."""
    kind = type(optimizer)
    if kind not in SERVED:
        served = ", ".join(kind.__name__ for kind in SERVED)
        raise TypeError(
            f"flat_parameters=True does not support {kind.__module__}.{kind.__name__}, only "
            f"{served} of torch.optim; use flat_buckets=True, which keeps only the gradients in "
            "one buffer"
        )
    check_flat_dtypes(optimizer, chain.from_iterable(g["params"] for g in optimizer.param_groups))


def check_flat_dtypes(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raises a ValueError for parameters that torch's fused kernel updates incorrectly.

    On a CPU, fused SGD of torch 2.13 pairs the wrong halves of 16-bit vectors, which gives errors
    as large as the update.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for p in parameters:
        if p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype} on a CPU, where torch's fused "
                "SGD updates 16-bit weights incorrectly; use flat_buckets=True with foreach=True, "
                "or fastguard.optim.SGD"
            )


def check_flat_parameters(parameters: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raises a TypeError or ValueError for parameters that cannot move into a buffer."""
    for i, p in enumerate(parameters):
        name = name_of(i, names)
        if is_dtensor(p) or is_managed(p):
            raise TypeError(
                f"{name} is a shard of FSDP or DeepSpeed, which is already flat; remove "
                "flat_parameters"
            )
        if not is_lazy(p) and type(p) not in PLAIN_TYPES:
            raise TypeError(
                f"{name} is a {type(p).__name__}, but flat_parameters=True supports only plain "
                "tensors; remove flat_parameters"
            )
    check_flat(parameters, names)
    for i, p in enumerate(parameters):
        if is_lazy(p) or not (p.requires_grad or p.grad is not None):
            continue
        name = name_of(i, names)
        if p.device.type not in DEVICES:
            raise ValueError(
                f"{name} is on device {p.device}, but flat_parameters=True requires one of "
                f"{', '.join(DEVICES)}; move the model before creating the guard"
            )
        if dtype_of_grad(p) != p.dtype:
            raise ValueError(
                f"{name} is {p.dtype} and its gradient {dtype_of_grad(p)}, but "
                "flat_parameters=True needs equal dtypes; use flat_buckets=True"
            )
        if p.device.type == "cpu" and p.is_shared():
            raise ValueError(
                f"{name} is in memory shared between processes, but flat_parameters=True would "
                "move it to other memory; remove flat_parameters"
            )


def check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises a ValueError if two tensors share memory, since moving would separate them."""
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + _extent(t), name)
        for name, t in named
        if type(t) in PLAIN_TYPES and t.layout is torch.strided and t.numel() and not t.is_meta
    )
    for (device, _, stop, name), (next_device, start, _, other) in pairwise(spans):
        if device == next_device and start < stop:
            raise ValueError(
                f"{name} and {other} are two parameters that share memory, and "
                "flat_parameters=True would separate them; assign the same Parameter object to "
                "both modules to tie them"
            )


def _extent(t: Tensor) -> int:
    """Returns the number of bytes from the first to the last element."""
    return t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
