"""What measure needs between its programs, kept from step to step: no launch to fill it with zeros.

    zeros     int64: a ticket, counts of segments, counts of tensors; zero between two launches
    partials  float64: sums of programs or chunks; anything between two launches

Whoever finds a count or the ticket other than zero sets it back to zero once it has been read: see
`summary`. Kernels of one stream follow each other, so there is one scratch per stream. A CUDA graph
gets one of its own, which it fills with zeros at each replay: its kernels may run beside those of
other streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.kernels.launch import raw_stream_of


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """See above.

    Attributes:
        key: Its device and stream; None if it is not to be kept.
    """

    zeros: Tensor
    partials: Tensor
    key: tuple[torch.device, int] | None


_kept: dict[tuple[torch.device, int], Scratch] = {}  # torch has few streams


def take(device: torch.device, n_zeros: int, n_partials: int) -> Scratch:
    """Memory for launches on the current stream.

    It is the caller's until `keep`. A caller that fails between two launches never gets there, and
    counts that none has set back are not seen by the next step.

    Args:
        device: Where.
        n_zeros, n_partials: How many numbers of each there must be.
    """
    if device.type == "cpu":
        key = (device, 0)
    elif torch.cuda.is_current_stream_capturing():
        return _made(device, n_zeros, n_partials, None)
    else:
        key = (device, raw_stream_of()(device.index))
    own = _kept.pop(key, None)
    if own is None or own.zeros.numel() < n_zeros or own.partials.numel() < n_partials:
        return _made(device, n_zeros, n_partials, key)
    return own


def keep(own: Scratch) -> None:
    """Gives the memory back, once all launches that use it have been made."""
    if own.key is not None:
        _kept[own.key] = own


def _made(
    device: torch.device, n_zeros: int, n_partials: int, key: tuple[torch.device, int] | None
) -> Scratch:
    return Scratch(
        zeros=torch.zeros(n_zeros, dtype=torch.int64, device=device),
        partials=torch.empty(n_partials, dtype=torch.float64, device=device),
        key=key,
    )
