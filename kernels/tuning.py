"""How the launches that walk the chunk table are shaped, for each kind of norm and dtype."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from fastguard.kernels.launch import INTERPRETED, INTERPRETED_PROGRAMS, n_processors


@dataclass(frozen=True, eq=False)  # known by identity: no launch hashes its fields
class Tuning:
    """What may be tried on a card without touching the kernel: see `benchmarks.tune`.

    Attributes:
        block_bytes: What a program reads at a time.
        num_warps: Of a program.
        programs: A multiprocessor: what registers leave room for, since a program that had to wait
            for the end of another would make the whole launch longer.
        max_registers: Of a thread.
        eviction: Of what was read, from L2.
    """

    block_bytes: int
    num_warps: int
    programs: int
    max_registers: int
    eviction: str = ""


# 256 threads with four 16-byte loads each in flight, 48 kB a multiprocessor.
PLAIN = Tuning(block_bytes=16384, num_warps=8, programs=3, max_registers=80)
# Other norms take logarithms and exponentials in float64: these bound them, and want registers.
ANY_POWER = Tuning(block_bytes=8192, num_warps=8, programs=2, max_registers=120)
ANY_POWER_16_BIT = replace(ANY_POWER, block_bytes=4096)  # as many elements a thread: no spills
PLAIN_NORMS = (1.0, 2.0, math.inf)  # without a logarithm


def tuning_of(norm_type: float, dtype: torch.dtype) -> Tuning:
    """The tuning for a kind of norm and the dtype of the gradients."""
    if norm_type in PLAIN_NORMS:
        return PLAIN
    return ANY_POWER_16_BIT if dtype.itemsize == 2 else ANY_POWER


@functools.cache
def n_programs(device: torch.device, tuning: Tuning = PLAIN) -> int:
    """The grid of launches that walk the chunk table, when there are enough chunks."""
    return INTERPRETED_PROGRAMS if INTERPRETED else tuning.programs * n_processors(device)
