"""Norm errors, peak memory, and the growth of the cost with the number of tensors."""

import copy
import math

import pytest
import torch

from guardtest.bench import CPU, a_case


def test_accuracy_shows_the_overflow_of_torch_and_none_of_fastguard(benchmarks):
    rows = benchmarks("accuracy").measure_accuracy(
        a_case(contenders=("torch foreach", "fastguard")), CPU
    )
    by_key = {(r["magnitude"], r["values"], r["contender"]): r["norm_error"] for r in rows}
    assert by_key[1e20, "normal", "torch foreach"] == math.inf
    assert max(e for (_, _, name), e in by_key.items() if name == "fastguard") < 1e-7


def test_peak_memory_counts_simultaneous_allocations(benchmarks):
    peak_bytes = benchmarks("memory").peak_bytes

    def two_at_once_then_one():
        a, b = torch.empty(1000), torch.empty(2000)
        del a, b
        torch.empty(500)

    assert peak_bytes(two_at_once_then_one, CPU) == 12_000


def test_fits_find_slope_and_exponent(benchmarks, result):
    growth = benchmarks("growth")
    made_up = copy.deepcopy(result)
    made_up["rows"] = []
    for n in growth.TENSORS:
        row = copy.deepcopy(result["rows"][0])
        ms = 1e-3 * n  # 1 µs per tensor
        row |= {"series": "tensors", "tensors": n, "contender": "fastguard"}
        row["host_ms"] = {"p20": ms, "p50": ms, "p80": ms}
        made_up["rows"].append(row)
    (fit,) = growth.fits(made_up)
    assert fit["slope"] == pytest.approx(1.0)
    assert fit["exponent"] == pytest.approx(1.0)
