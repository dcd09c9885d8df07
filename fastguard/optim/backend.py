"""Selects the implementation of an update by device.

cpu        torch's fused kernels on pieces that fit in the cache, or the reference's operations
triton     devices for which `fastguard.stages.backend` selects Triton: one launch for all tensors
reference  all other devices: plain PyTorch, without a sync
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import PLAIN, kind_of
from fastguard.optim import cpu, reference
from fastguard.optim.contract import Update
from fastguard.stages.backend import backend_of

Updater = Callable[[Update], Tensor | None]
"""An implementation: takes a step, and returns what was clipped, as `reference` does."""


def updater_of(update: Update) -> Updater:
    """Returns the implementation for an update; tensors without data use the reference."""
    if kind_of(set(map(type, update.parameters))) is not PLAIN:
        return reference.update
    return updater_for(update.device)


def updater_for(device: torch.device) -> Updater:
    """Returns the implementation for a device."""
    if device.type == "cpu":
        return cpu.update
    return _kernel() if backend_of(device) == "triton" else reference.update


def _kernel() -> Updater:
    """Imports triton, which takes half a second, for the first GPU tensor."""
    from fastguard.optim import triton

    return triton.update
