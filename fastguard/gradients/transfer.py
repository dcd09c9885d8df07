"""Transfers small tensors and a few numbers between devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import watched


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on another device.

    Waits for the device only if the copy goes to the CPU. With `t.to("cpu", non_blocking=True)`,
    the result would be undefined until the data has arrived.

    That copy must be waited for: `t.to("cpu", non_blocking=True)` returns before the data has
    arrived, so the result would have undefined contents at first.
    """
    if t.device == device:  # this check takes half the time of a `to` that does nothing
        return t
    return t.to(device, non_blocking=device.type != "cpu")


def numbers_on(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Returns host numbers as a tensor `(n,)`. Never syncs; works while a CUDA graph is captured.

    A copy from pageable memory would sync. A single number is passed as the argument of a fill
    kernel; several numbers are copied from pinned memory. During a capture, each number gets its
    own fill kernel, because a copy in the graph would read the pinned memory again in every replay.
    """
    if device.type != "cuda" or watched():
        return moved(torch.tensor(values, dtype=dtype, device="cpu"), device)
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    if len(values) == 1 or torch.cuda.is_current_stream_capturing():
        filled = [torch.full((1,), value, dtype=dtype, device=device) for value in values]
        return filled[0] if len(filled) == 1 else torch.cat(filled)
    pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
    return pinned.to(device, non_blocking=True)


def current_stream_of(device: torch.device) -> int:
    """Returns the address of a GPU's current stream; 0 for other devices.

    Data that is cached on the device is valid for one stream only, since work on another stream may
    run before the data has arrived.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
