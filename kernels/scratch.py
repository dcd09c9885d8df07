"""Memory shared by the programs of `measure`, reused across steps and zeroed only once.

    zeros     int64: a ticket, counts of segments, counts of tensors; zero between two launches
    partials  float64: partial sums per program or chunk; arbitrary between two launches

A program that reads a nonzero count or ticket resets it to zero; see `summary`. Kernels on one
stream run in order, so there is one scratch per stream. A CUDA graph gets its own scratch, which is
zeroed at each replay, since the kernels of the graph may run concurrently with kernels on other
streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.kernels.launch import raw_stream_of


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """The memory for launches on one stream.

    Attributes:
        zeros: int64: ticket and counts.
        partials: float64: partial sums.
        key: Device and stream; None if the memory is not reused.
    """

    zeros: Tensor
    partials: Tensor
    key: tuple[torch.device, int] | None


# one entry per stream, since torch has few streams
_kept: dict[tuple[torch.device, int], Scratch] = {}


def take(device: torch.device, n_zeros: int, n_partials: int) -> Scratch:
    """Takes the memory for launches on the current stream, until the caller passes it to `keep`.

    A caller that fails between two launches must not call `keep`: some counts were not reset, and
    would affect the next step.

    Args:
        device: The device.
        n_zeros, n_partials: Minimum number of elements of `zeros` and of `partials`.
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
    """Makes the memory available again; call it after all launches that use the memory."""
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
