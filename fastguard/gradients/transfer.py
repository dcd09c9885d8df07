"""Small tensors and a few numbers on their way between devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import watched


def moved(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device. Waits on the way to a CPU alone.

    There it must: `t.to("cpu", non_blocking=True)` returns pinned memory that the copy has yet to
    reach, and whoever reads it at once reads what was there before.
    """
    if t.device == device:  # half the time of a `to` that has nothing to do
        return t
    return t.to(device, non_blocking=device.type != "cpu")


def numbers_on(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Numbers of the host as a tensor `(n,)`. Waits for nothing, and fits into a CUDA graph.

    To a GPU no copy from pageable memory does both. As the argument of a fill a number is a part of
    the launch; many travel from pinned memory, which a graph would have to keep.
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
    """The address of the stream that work on a device is queued on now; 0 off a GPU.

    What is kept for later calls is kept for one stream: to another it may not have come yet.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
