"""Measuring on a CPU takes less than 16 MB of memory besides the gradients."""

import itertools
import math
import threading

import pytest
import torch

from fastguard.gradients import vectors
from fastguard.gradients.buckets import bucketize
from fastguard.stages.cpu import l2_sums
from fastguard.stages.cpu import measure as cpu_measure
from guardtest.cpu_norms import blocks

N = 5_000_000


def allocated_at_most(work) -> int:
    """Returns the peak of the bytes that torch allocated during `work`."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    deltas = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert deltas, "the profiler saw no allocation at all"
    return max(itertools.accumulate(deltas))


BULKY = {
    "fp32": lambda: [torch.ones(N)],
    "bf16": lambda: [torch.ones(N, dtype=torch.bfloat16)],
    "fp64": lambda: [torch.ones(N, dtype=torch.float64)],
    "1000 small": lambda: [torch.ones(N // 1000) for _ in range(1000)],
    "1000 small bf16": lambda: [torch.ones(N // 1000).bfloat16() for _ in range(1000)],
    "channels_last": lambda: [
        torch.ones(100, 50, 100, 10).contiguous(memory_format=torch.channels_last)
    ],
    "transposed": lambda: [torch.ones(2000, 2500).T],
    "overflow": lambda: [torch.full((N,), 1e20)],
    "underflow": lambda: [torch.full((N,), 1e-25)],
    "all NaN": lambda: [torch.full((N,), math.nan)],
    "disagreeing blocks": lambda: [blocks(torch.rand(N // l2_sums.BLOCK) + 1.0, l2_sums.BLOCK)],
}


@pytest.mark.parametrize(
    ("case", "norm_type"),
    [*((case, 2.0) for case in BULKY), ("all NaN", 3.5), ("fp64", 1.0), ("transposed", math.inf)],
)
def test_working_memory_stays_under_16_MB(monkeypatch, case, norm_type):
    (bucket,) = bucketize(BULKY[case]()).buckets
    monkeypatch.setattr(vectors, "_local", threading.local())  # includes the buffers
    assert allocated_at_most(lambda: cpu_measure.power_sums(bucket, 1, norm_type)) < 16 * 2**20
