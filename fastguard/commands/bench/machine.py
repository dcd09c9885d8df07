"""Describes the machine and the versions, and measures the speed of the memory.

Each ceiling is an upper limit for the speed of every case. It is therefore the best of several ways
in which PyTorch can move the same bytes.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastguard.commands.bench.clock import Clock
from fastguard.records.run_header import installed_version

CEILING_BYTES = {"cpu": 2**28, "cuda": 2**30}  # eight times the largest cache of a laptop or a card
TRIES = 7


@dataclass(frozen=True)
class Ceilings:
    """Memory bandwidths in GB/s (1e9 bytes).

    Update (in place) and copy count bytes read plus bytes written.
    """

    read_gb_s: float
    update_gb_s: float
    copy_gb_s: float


def ceilings(device: torch.device, *, n_bytes: int | None = None) -> Ceilings:
    """Measures the memory bandwidth of a device for about a second."""
    n_bytes = n_bytes or CEILING_BYTES.get(device.type, 2**28)
    x = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    clock = Clock(device)
    rows = x.view(-1, 256)
    # No single reduction is the fastest on every machine.
    readers: list[Callable[[], object]] = [
        lambda: x.sum(),
        lambda: torch.linalg.vector_norm(rows, dim=1),
        lambda: torch.dot(x, x),
        lambda: x.max(),
    ]
    updaters: list[Callable[[], object]] = [
        lambda: x.mul_(1.0),
        lambda: torch._foreach_mul_([x], 1.0),
    ]
    copiers: list[Callable[[], object]] = [lambda: y.copy_(x), lambda: torch.mul(x, 1.0, out=y)]

    def best(calls: list[Callable[[], object]]) -> float:
        return min(min(clock.sample(call).work_ms for _ in range(TRIES)) for call in calls) / 1e3

    return Ceilings(
        read_gb_s=n_bytes / best(readers) / 1e9,
        update_gb_s=2 * n_bytes / best(updaters) / 1e9,
        copy_gb_s=2 * n_bytes / best(copiers) / 1e9,
    )


class Evictor:
    """Evicts the caches by reading unrelated memory.

    Reading, unlike filling, leaves nothing to be written back during the measured call. Two buffers
    alternate, so that the memory read is not itself cached. New addresses for the gradients would
    evict them too, but would also invalidate caches keyed by address, which stay valid in training.
    """

    def __init__(self, device: torch.device) -> None:
        n_bytes = 2 * max(cache_bytes(device), 2**24)
        self._buffers = [torch.ones(n_bytes // 4, device=device) for _ in range(2)]
        self._next = 0

    def __call__(self) -> None:
        self._next = 1 - self._next
        self._buffers[self._next].sum()


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if path.read_text().strip().endswith("K")
    ]
    return max(sizes, default=2**25)


def describe_machine(device: torch.device) -> dict[str, str | int | float]:
    """The machine's relevant properties, without names of the machine or its user."""
    facts: dict[str, str | int | float] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cache_mb": cache_bytes(device) / 2**20,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gb": round(card.total_memory / 1e9, 1),
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(),
        }
    return facts


def title_of(machine: dict[str, str | int | float]) -> str:
    """A short description of the machine for captions."""
    return (
        str(machine["card"]) if "card" in machine else f"{machine['cpu']}, {machine['cores']} cores"
    )


def slug_of(machine: dict[str, str | int | float]) -> str:
    """A short description for file names, such as `"cpu-amd-epyc-2-cores"`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['device']} {title_of(machine)}".lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of everything that can affect a result."""
    import fastguard

    found = {
        "fastguard": fastguard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy", "apex", "transformer_engine", "nemo_automodel"):
        if (version := installed_version(package)) is not None:
            found[package] = version
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The commit of the source tree, with `-dirty` if changed; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def available_bytes(device: torch.device) -> int:
    """Memory in bytes that a case may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 2**32


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)", "", name).split())


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
