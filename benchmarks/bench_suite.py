"""The cases under pytest-benchmark: `pytest benchmarks --benchmark-only`, all, or `-k gpt2`.

Before each measured round, the baseline of the case runs once, so each round has a ratio. Ratios
and the percentage of the limit are in `extra_info` of `--benchmark-json`. `--device cuda` measures
on a GPU.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch

from benchmarks.suite import cases
from fastguard.commands.bench.clock import Clock, Sample
from fastguard.commands.bench.contenders import Prepared
from fastguard.commands.bench.machine import Ceilings, available_bytes, ceilings
from fastguard.commands.bench.runner import prepare, summarize, warm_up
from fastguard.commands.bench.workload import Case, Workload, bytes_needed
from fastguard.commands.terminal import incidents_unlogged

ROUNDS = 7


@functools.lru_cache(maxsize=1)  # size 1, since tests of the same case are consecutive
def field_of(case: Case, device: torch.device) -> tuple[Workload, dict[str, Prepared], dict]:
    work = Workload(case, device)
    return work, *prepare(work)


@functools.cache
def limit_of(device: torch.device) -> Ceilings:
    return ceilings(device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device(str(metafunc.config.getoption("--device")))
    pairs = [(case, name) for case in cases(device) for name in case.contenders]
    ids = [f"{case.id}: {name}" for case, name in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=ids)


def test_case(benchmark, case: Case, contender: str, request: pytest.FixtureRequest) -> None:
    device = torch.device(str(request.config.getoption("--device")))
    if bytes_needed(case) > 0.8 * available_bytes(device):
        pytest.skip(f"needs {bytes_needed(case) / 1e9:.0f} GB of memory")
    benchmark.group = case.id
    with torch.no_grad(), incidents_unlogged():
        work, field, left_out = field_of(case, device)
        if contender in left_out:
            pytest.skip(left_out[contender])
        clock, mine = Clock(device), field[contender]
        other = field[case.baseline]
        error = warm_up(mine, work)
        warm_up(other, work)
        own: list[Sample] = []
        peer: list[Sample] = []

        def setup() -> None:
            peer.append(clock.sample(other.call, other.restore))
            mine.restore()

        def timed() -> None:
            start = time.perf_counter()
            mine.call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ms = (time.perf_counter() - start) * 1e3
            own.append(Sample(ms, ms, ms))

        benchmark.pedantic(timed, setup=setup, rounds=ROUNDS)
        own, peer = own[-ROUNDS:], peer[-ROUNDS:]
        mine.restore()
    row = summarize(case, contender, own, peer, limit_of(device), error)
    benchmark.extra_info.update(row.as_dict())
