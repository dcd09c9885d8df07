"""benchmarks/host_time.py times every stage of a step that uses the kernels."""

import pytest

from guardtest.bench import benchmarks

host_time = benchmarks("host_time")


@pytest.mark.parametrize("name", host_time.WAYS)
def test_every_stage_is_timed(name):
    """Functions are found by name, so a renamed function would leave its stage without time."""
    n_places, settings = host_time.WAYS[name]
    with host_time.as_on_a_gpu():
        times = host_time.Case([3, 5, 1], n_places, **settings).times()
    assert len(times) == host_time.STEPS - 1
    of_others = set() if "flat_parameters" in settings else {"runs in place of parameters"}
    for each in times:
        timed = {stage for stage in host_time.STAGES if each.get(stage, 0.0) > 0.0}
        assert timed == set(host_time.STAGES) - of_others
        assert min(each[host_time.GUARD], each[host_time.WHOLE], each[host_time.REST]) > 0.0
