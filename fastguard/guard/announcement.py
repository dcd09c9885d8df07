"""The line that says once that an optimizer is guarded, and how."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.optim import Optimizer

from fastguard.errors.last_resort import announce

if TYPE_CHECKING:
    from fastguard.guard.reporting import KnownRun

log: logging.Logger = logging.getLogger("fastguard")

_ANNOUNCED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def announce_guard(guard: KnownRun) -> None:
    """Says what is guarded and how, once for each wrapped optimizer; only the first rank prints.

    The others log it at level INFO, which is not shown unless the program asks for it.
    """
    if guard.optimizer in _ANNOUNCED:
        return
    _ANNOUNCED.add(guard.optimizer)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        log.info("%s", guard.describe())
    else:
        announce(guard.describe())
