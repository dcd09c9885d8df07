"""Shared helpers of the incidents that have their own training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.commands.demo.training import one_thread
from fastguard.commands.terminal import incidents_unlogged


@contextmanager
def quiet_one_thread() -> Iterator[None]:
    """Limits torch to one thread and hides the log output of fastguard."""
    with one_thread(), incidents_unlogged():
        yield


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements of all tensors are finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def state_is_finite(optimizer: Optimizer) -> bool:
    """Whether all tensors in an optimizer's state are finite."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return all_finite(value for value in kept if isinstance(value, Tensor))
