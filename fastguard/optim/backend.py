"""Which implementation takes the update of a bucket: by device, one table.

cpu        torch's fused kernels over pieces that fit in a cache, or the reference's operations
triton     devices that `fastguard.stages.backend` serves with kernels: one launch over all tensors
reference  every other device: plain PyTorch, which waits for nothing
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastguard.gradients.tensor_kinds import PLAIN, kind_of
from fastguard.optim import cpu, reference
from fastguard.optim.contract import Update
from fastguard.stages.backend import backend_of


def updater_of(update: Update) -> Callable[[Update], None]:
    """What takes an update: tensors that hold no numbers yet are left to the reference."""
    if kind_of(set(map(type, update.parameters))) is not PLAIN:
        return reference.update
    return updater_for(update.device)


def updater_for(device: torch.device) -> Callable[[Update], None]:
    """What takes the updates on a device."""
    if device.type == "cpu":
        return cpu.update
    return _kernel() if backend_of(device) == "triton" else reference.update


def _kernel() -> Callable[[Update], None]:
    """Imported for the first GPU tensor: importing triton takes half a second."""
    from fastguard.optim import triton

    return triton.update
