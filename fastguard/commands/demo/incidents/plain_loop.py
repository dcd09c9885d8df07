"""What the incidents share that have a training loop of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.commands.demo.training import one_thread


@contextmanager
def alone() -> Iterator[None]:
    """One thread, and no log: the story is told at its end."""
    log = logging.getLogger("fastguard")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with one_thread():
            yield
    finally:
        log.setLevel(before)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element of any tensor is NaN or Inf."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def state_is_finite(optimizer: Optimizer) -> bool:
    """The same of everything that an optimizer keeps."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return all_finite(value for value in kept if isinstance(value, Tensor))
