"""Counts the syncs of a guarded step with a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

import fastguard


def count_syncs(device: torch.device) -> int | None:
    """Returns the syncs that PyTorch detects in ten guarded steps of a fused AdamW; None on a CPU.

    The steps have a changing limit, rules, losses on device and host, a loss scaler, and fetch
    records.
    """
    if device.type != "cuda":
        return None
    parameters = [torch.nn.Parameter(torch.zeros(1000, device=device)) for _ in range(10)]
    guarded = fastguard.GuardedOptimizer(
        torch.optim.AdamW(parameters, fused=True), max_norm=1.0, spike=fastguard.SpikeRule()
    )
    loss = torch.ones((), device=device)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    scaler.scale(loss)  # this call creates the scaler's tensors

    def step(k: int) -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        guarded.max_norm = 1.0 + k % 2
        losses = {"loss": loss, "aux": 0.5}
        if k % 3:
            guarded.step(loss=losses)
        else:
            scaler.step(guarded, loss=losses)
            scaler.update()
        guarded.records()

    step(0)  # creates the state of the optimizer
    waits = waits_of(lambda: [step(k) for k in range(10)], device)
    for wait in sorted(set(waits)):
        print(f"a guarded step synced: {wait}")
    return len(waits)


def waits_of(work: Callable[[], object], device: torch.device) -> list[str]:
    """Returns the messages of PyTorch for each sync with a GPU in `work`."""
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Leaves out a notice (once per process) that the mode misses some synchronizing operations.
    return [str(w.message) for w in seen if "called a synchronizing" in str(w.message)]
