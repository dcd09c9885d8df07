"""Transfers small tensors and a few numbers between devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import watched


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on another device. Synchronises only on the way to a CPU.

    There it must: `t.to("cpu", non_blocking=True)` returns pinned memory before the copy has
    arrived, so reading it at once would return old contents.
    """
    if t.device == device:  # half the time of a `to` that has nothing to do
        return t
    return t.to(device, non_blocking=device.type != "cpu")


def numbers_on(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Returns host numbers as a tensor `(n,)`. Never syncs, and works in a CUDA graph.

    A copy to a GPU from pageable memory cannot do both. A single number is passed as the argument
    of a fill, as part of the launch; several are copied from pinned memory, which a graph has to
    keep.
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
    """Returns the address of the stream that a device's work is queued on now; 0 off a GPU.

    Cached data are valid for one stream only; they may not have arrived yet for another.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
