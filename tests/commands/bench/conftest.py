"""Fixtures: the benchmarks of the source tree, and one small result."""

import pytest

from fastguard.commands.bench import Case
from fastguard.commands.bench.session import measure_cases
from fastguard.commands.bench.steps import STEPS
from guardtest import bench
from guardtest.bench import CPU, LIMIT, ON_CPU, SHAPES, a_case


@pytest.fixture(scope="session")
def benchmarks():
    """Imports modules of `benchmarks/`, which is not installed."""
    return bench.benchmarks


def measured():
    cases = [
        a_case(),
        a_case(situation="clipping"),
        *(
            a_case(name=f"{n} x 9", series="tensors", shapes=((9,),) * n, contenders=ON_CPU)
            for n in (1, 2, 3)
        ),
        Case(
            "tiny", SHAPES, tuple(STEPS), "clip + isfinite(norm) + step",
            optimizer=("AdamW", "fused"),
        ),
    ]  # fmt: skip
    return measure_cases(cases, CPU, command="python -m benchmarks", seconds=0.0)


@pytest.fixture(scope="session")
def result(benchmarks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastguard.commands.bench.session.ceilings", lambda device: LIMIT)
        found = measured()
    found["fits"] = benchmarks("growth").fits(found)
    memory = benchmarks("memory")
    found["memory"] = [
        row
        for mb in (1, 2)
        for row in memory.measure_memory(Case(f"{mb} MB", [(mb * 2**17,)] * 2, memory.FIELD), CPU)
    ]
    return found
