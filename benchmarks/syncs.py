"""How often a guarded step makes the host wait for a GPU."""

from __future__ import annotations

import warnings

import torch

import fastguard


def count_syncs(device: torch.device) -> int | None:
    """Waits that PyTorch sees in ten guarded steps of a fused AdamW; None on a CPU."""
    if device.type != "cuda":
        return None
    parameters = [torch.nn.Parameter(torch.zeros(1000, device=device)) for _ in range(10)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    guarded = fastguard.GuardedOptimizer(
        torch.optim.AdamW(parameters, fused=True), max_norm=1.0, spike=fastguard.SpikeRule()
    )
    loss = torch.ones((), device=device)
    guarded.step(loss=loss)  # creates the optimizer's state
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(10):
                guarded.step(loss=loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in seen)
