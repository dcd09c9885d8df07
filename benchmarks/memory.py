"""Working memory: the peak of what a call allocates besides the gradients.

On a CPU, the profiler of PyTorch sees every allocation. The call runs in a new thread, because
staging buffers are per thread and would otherwise already exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastguard.commands.bench.contenders import CONTENDERS
from fastguard.commands.bench.workload import Case, Shape, Workload

FIELD = ("torch foreach", "isfinite + clip", "fastguard", "fastguard flat")
MEGABYTES = (1, 8, 64, 512, 2048)
TENSORS = 16


def memory_cases() -> list[Case]:
    """Returns models of increasing size, and many small tensors."""

    def evenly(mb: int, itemsize: int) -> list[Shape]:
        return [(mb * 2**20 // itemsize // TENSORS,)] * TENSORS

    return [
        *(Case(f"{mb} MB", evenly(mb, 4), FIELD) for mb in MEGABYTES),
        Case("512 MB", evenly(512, 2), FIELD, dtype="bf16"),
        Case("5000 x 100", [(100,)] * 5000, FIELD),
    ]


def measure_memory(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Measures the peak of each contender of a case."""
    found = []
    with torch.no_grad():
        work = Workload(case, device)
        for name in case.contenders:
            prepared = CONTENDERS[name](work)
            found.append(
                {
                    "case": case.id,
                    "contender": name,
                    "grad_bytes": case.grad_bytes,
                    "working_bytes": peak_bytes(prepared.call, device),
                }
            )
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Returns the peak of memory that `call` holds at once, in bytes."""
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU]):  # the profiler must first run in this thread
        pass
    peaks: list[int] = []
    thread = threading.Thread(target=lambda: peaks.append(_profiled_peak(call)))
    thread.start()
    thread.join()
    return peaks[0]


def _profiled_peak(call: Callable[[], object]) -> int:
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, now)
    return most
