"""Prints one line when an optimizer is guarded for the first time."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.optim import Optimizer

from fastguard.errors.logger import announce, log

if TYPE_CHECKING:
    from fastguard.guard.reporting import ReportingOptimizer

_ANNOUNCED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def announce_guard(guard: ReportingOptimizer) -> None:
    """Prints what is guarded and how, once per wrapped optimizer and only on rank 0.

    The other ranks log it at level INFO, which is hidden by default.
    """
    if guard.optimizer in _ANNOUNCED:
        return
    _ANNOUNCED.add(guard.optimizer)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        log.info("%s", guard.describe())
    else:
        announce(guard.describe())
