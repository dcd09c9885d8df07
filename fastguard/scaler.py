"""What a `GradScaler` hands to the optimizer that it steps, and what it learns back from all ranks.

A scaler looks at the gradients of its own rank. Where one rank alone holds the Inf (a pipeline
stage), it alone would halve its scale, and from then on the ranks would add gradients of different
scales. `GradScaler.step` hands over the number that it found, but not itself; so the scaler is
looked up where it is bound to be, in the frame that called `step`. That happens on several ranks
only, and costs a few microseconds.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastguard.transfer import moved, numbers_on

_NEAREST = 12  # frames between GradScaler.step and ours: hooks, profiler, a scheduler's counter


def handed_over(optimizer: Optimizer, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """What a scaler left on the optimizer: `inv_scale` and `found_inf` of `Signals`."""
    inv_scale = found_inf = None
    scale = getattr(optimizer, "grad_scale", None)  # None after GradScaler.unscale_
    if scale is not None:
        inv_scale = moved(scale.double(), device).reshape(()).reciprocal()
    found = getattr(optimizer, "found_inf", None)
    if found is not None:
        if not isinstance(found, Tensor):  # the number 0 where a rank had no gradient to look at
            found = numbers_on((float(found),), device, torch.float32)
        found_inf = moved(found, device).reshape(())
    return inv_scale, found_inf


def tell_scaler(optimizer: Optimizer, found_inf: Tensor | None) -> None:
    """Replaces what the scaler that steps this optimizer found by what all ranks found.

    Args:
        optimizer: What `GradScaler.step` was called with.
        found_inf: float32 `()`, 1 if the scaler of any rank found something non-finite, else 0.
    """
    scaler = _stepping(optimizer)
    if scaler is None or scaler._scale is None or found_inf is None:
        return
    found = found_inf.to(scaler._scale.device, copy=True)  # the scaler adds to it
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found}


def _stepping(optimizer: Optimizer) -> torch.amp.GradScaler | None:
    """The scaler whose `step` runs now, with this optimizer."""
    frame = sys._getframe(1)
    for _ in range(_NEAREST):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code.co_name != "step":
            continue
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler if id(optimizer) in scaler._per_optimizer_states else None
    return None
