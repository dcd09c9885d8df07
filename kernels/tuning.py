"""Launch parameters of the kernels that process the chunk table, by kind of norm and dtype."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from fastguard.kernels.launch import INTERPRETED, INTERPRETED_PROGRAMS, n_processors


@dataclass(frozen=True, eq=False)  # compared by identity, so that launches do not hash the fields
class Tuning:
    """Parameters that can be tuned on a card without changing the kernel; see `benchmarks.tune`.

    Attributes:
        block_bytes: Bytes that a program reads at a time.
        num_warps: Warps per program.
        programs: Programs per multiprocessor, limited by registers. All programs must run at the
            same time, since a program that starts only after another one has ended prolongs the
            launch.
        max_registers: Maximum registers per thread.
        eviction: Eviction policy of L2 for data that was read.
    """

    block_bytes: int
    num_warps: int
    programs: int
    max_registers: int
    eviction: str = ""


# 256 threads with four 16-byte loads in flight each, 48 kB per multiprocessor.
PLAIN = Tuning(block_bytes=16384, num_warps=8, programs=3, max_registers=80)
# Other norms need logarithms and exponentials in float64, which limit the speed and take registers.
ANY_POWER = Tuning(block_bytes=8192, num_warps=8, programs=2, max_registers=120)
# the same number of elements per thread, so that no register is spilled
ANY_POWER_16_BIT = replace(ANY_POWER, block_bytes=4096)
PLAIN_NORMS = (1.0, 2.0, math.inf)  # norms that need no logarithm


def tuning_of(norm_type: float, dtype: torch.dtype) -> Tuning:
    """Returns the tuning for a norm and the dtype of the gradients."""
    if norm_type in PLAIN_NORMS:
        return PLAIN
    return ANY_POWER_16_BIT if dtype.itemsize == 2 else ANY_POWER


@functools.cache
def n_programs(device: torch.device, tuning: Tuning = PLAIN) -> int:
    """Returns the number of programs of a launch with enough chunks."""
    return INTERPRETED_PROGRAMS if INTERPRETED else tuning.programs * n_processors(device)
