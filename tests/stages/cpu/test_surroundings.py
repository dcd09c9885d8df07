"""Norms are reproducible, on many threads and with any torch default."""

import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastguard.gradients import vectors
from guardtest.cpu_norms import assert_norm_is_true, norm_of
from guardtest.grads import DTYPES
from guardtest.tolerances import MEASURED_RTOL


@pytest.mark.parametrize("dtype", DTYPES)
def test_determinism(dtype):
    tensors = [torch.randn(n).to(DTYPES[dtype]) for n in (100, 300_000, 5000)]
    first = norm_of(tensors)
    norm_of([torch.randn(400_000)])  # leaves other values in the staging buffer
    assert norm_of([t.clone() for t in tensors]) == first


def test_many_threads_at_once():
    def work(k: int) -> float:
        generator = torch.Generator().manual_seed(k)
        sizes = [90, 70_000, *[4000] * 30]  # mostly through the staging buffer
        tensors = [torch.randn(n, generator=generator) for n in sizes]
        return norm_of(tensors)

    alone = [work(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, list(range(8)) * 6)) == alone * 6


@pytest.mark.parametrize("default", ["meta", "float64", "inference_mode"])
def test_ambient_defaults_change_nothing(default, monkeypatch):
    monkeypatch.setattr(vectors, "_local", threading.local())
    sizes = (100, 200_000)
    tensors = [torch.arange(n, dtype=torch.float32) for n in sizes]
    expected = norm_of(tensors)
    monkeypatch.setattr(vectors, "_local", threading.local())
    dtype = torch.get_default_dtype()
    ambience = {
        "meta": lambda: torch.device("meta"),  # as after torch.set_default_device("cuda")
        "float64": contextlib.nullcontext,
        "inference_mode": torch.inference_mode,
    }[default]
    try:
        with ambience():
            if default == "float64":
                torch.set_default_dtype(torch.float64)
            assert norm_of(tensors) == expected
            assert norm_of([tensors[0][:0]], math.inf) == 0.0
    finally:
        torch.set_default_dtype(dtype)
    assert norm_of(tensors) == expected


def test_gradients_of_gradients_are_measured_without_a_graph():
    x = torch.randn(200_000, requires_grad=True)
    with torch.no_grad():
        assert norm_of([x * 2.0]) == pytest.approx(2 * norm_of([x]), rel=MEASURED_RTOL)
    assert_norm_is_true(*(x.view(-1, 5000) * 2.0).unbind())
