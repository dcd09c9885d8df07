"""Which implementation takes the update of a bucket: by device, one table.

cpu        torch's fused kernels over pieces that fit in a cache, or the reference's operations
reference  every other device: plain PyTorch, which waits for nothing
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastguard.gradients.tensor_kinds import PLAIN, kind_of
from fastguard.optim import cpu, reference
from fastguard.optim.contract import Update


def updater_of(update: Update) -> Callable[[Update], None]:
    """What takes an update: tensors that hold no numbers yet are left to the reference."""
    if kind_of(set(map(type, update.parameters))) is not PLAIN:
        return reference.update
    return updater_for(update.device)


def updater_for(device: torch.device) -> Callable[[Update], None]:
    """What takes the updates on a device."""
    return cpu.update if device.type == "cpu" else reference.update
