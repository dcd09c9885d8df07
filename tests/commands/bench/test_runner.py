"""The benchmark runner. No test asserts on time."""

from dataclasses import replace

import pytest

from fastguard.commands.bench import Workload, run_case
from fastguard.commands.bench.clock import Clock, Sample
from fastguard.commands.bench.contenders import CONTENDERS, PEERS_ON_CUDA
from fastguard.commands.bench.machine import ceilings, describe_machine, slug_of
from fastguard.commands.bench.runner import MIN_ROUNDS, Spread, interleave, summarize
from guardtest.bench import CPU, LIMIT, ON_CPU, a_case


def test_rounds_interleave_and_rotate_the_contenders():
    work = Workload(a_case(contenders=("torch foreach", "fastguard")), CPU)
    seen = []

    def watched(name):
        prepared = CONTENDERS[name](work)
        return replace(prepared, restore=lambda: seen.append(name))

    contenders = {name: watched(name) for name in work.case.contenders}
    samples = interleave(contenders, work, seconds=0.0)
    counts = {name: len(s) for name, s in samples.items()}
    assert counts == dict.fromkeys(contenders, MIN_ROUNDS)
    first, second = work.case.contenders
    assert seen[:8] == [first, second, second, first, first, second, second, first]


def test_ratios_are_computed_within_rounds():
    baseline = [Sample(t, t, t) for t in (2.0, 20.0, 200.0)]
    own = [Sample(t, t, t) for t in (1.0, 10.0, 100.0)]
    row = summarize(a_case(), "fastguard", own, baseline, LIMIT, None)
    assert row.ratio == Spread(2.0, 2.0, 2.0)
    assert row.ms.p50 == 10.0
    assert row.limit_percent == pytest.approx(100 * a_case().grad_bytes / 1e10 / 10e-3)


def test_the_ratio_of_the_baseline_is_1():
    rows, left_out = run_case(a_case(), CPU, LIMIT, seconds=0.0)
    by_name = {row.contender: row for row in rows}
    assert set(by_name) == set(ON_CPU)
    assert set(left_out) == set(PEERS_ON_CUDA)
    assert by_name["torch foreach"].ratio == Spread(1.0, 1.0, 1.0)
    assert all(row.norm_error is not None and row.norm_error < 1e-6 for row in rows)


def test_a_failing_peer_is_left_out_but_a_failing_fastguard_raises():
    rows, left_out = run_case(a_case(dtype="fp16"), CPU, LIMIT, seconds=0.0)
    assert "FP16" in left_out["GradScaler + clip"]
    assert "fastguard" in {row.contender for row in rows}

    def broken(work):
        raise AssertionError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            CONTENDERS,
            "fastguard",
            lambda w: replace(CONTENDERS["torch foreach"](w), call=lambda: broken(w)),
        )
        with pytest.raises(AssertionError, match="broken"):
            run_case(a_case(), CPU, LIMIT, seconds=0.0)


def test_a_case_that_does_not_fit_into_memory_is_left_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastguard.commands.bench.runner.available_bytes", lambda device: 1000)
        rows, left_out = run_case(a_case(), CPU, LIMIT)
    assert rows == []
    assert "memory" in left_out["fastguard"]


def test_preparation_is_not_timed():
    called = []
    sample = Clock(CPU).sample(lambda: called.append("call"), lambda: called.append("prepare"))
    assert called == ["prepare", "call"]
    assert sample.wall_ms == sample.host_ms == sample.device_ms


def test_bandwidths_and_machine_are_described():
    found = ceilings(CPU, n_bytes=2**16)
    assert min(found.read_gb_s, found.update_gb_s, found.copy_gb_s) > 0
    machine = describe_machine(CPU)
    assert {"device", "cpu", "cores", "capability"} <= set(machine)
    assert slug_of({"device": "cpu", "cpu": "AMD EPYC", "cores": 2}) == "cpu-amd-epyc-2-cores"
