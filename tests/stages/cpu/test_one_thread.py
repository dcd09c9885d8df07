"""Below a few MB, no stage waits for a second thread, whose core may be busy."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fastguard
from fastguard.gradients.vectors import FEW, GRAIN, in_pieces

TASKS = Path("/proc/self/task")

LISTS = {
    "29 tensors of 0.5 MB": [4500] * 29,
    "many small ones": [100] * 5000,
    "many of 1000": [1000] * 2000,
    "many of 5000": [5000] * 400,
    "one of 3 MB": [FEW - 100],
    "some above the grain": [GRAIN + 1000] * 5 + [64, 3] * 50,
    "some large among 7 MB": [100_000] * 5 + [7000] * 200 + [64] * 100,
}


def runs(task: Path) -> int:
    """Returns how often the scheduler has run a thread."""
    return int((task / "schedstat").read_text().split()[2])


@pytest.fixture(autouse=True)
def fast_path_for_small_tensors():
    """Overrides the fixture of the folder: these tests need the real sizes."""


@pytest.fixture(scope="module")
def workers():
    """The worker threads of torch, with two threads allowed.

    Threads that also run while torch is idle are left out. For example, tests of ranks leave gloo's
    event loop in this process, which polls a hundred times per second.
    """
    if not (TASKS / str(threading.get_native_id()) / "schedstat").exists():
        pytest.skip("this system does not say what its threads do")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.ones(2**22)
    x.sum()  # starts the threads
    others = [t for t in TASKS.iterdir() if t.name != str(threading.get_native_id())]
    counts = settled(others)
    time.sleep(0.2)
    others = [t for t, n in zip(others, counts, strict=True) if runs(t) == n]
    for _ in range(3):
        counts = settled(others)
        x.sum()
        others = [t for t, n in zip(others, counts, strict=True) if runs(t) > n]
    assert others, "torch woke no thread for four million elements"
    yield others
    torch.set_num_threads(before)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Returns a parameter with a gradient of ones, created on one thread so that workers sleep."""
    p = torch.nn.Parameter(torch.from_numpy(np.zeros(shape, np.float32)).to(dtype))
    p.grad = torch.from_numpy(np.ones(shape, np.float32)).to(dtype)
    return p


def settled(tasks: Sequence[Path]) -> list[int]:
    """Returns the run counts of threads once they sleep. After work, they spin for a while."""
    while not all(_sleeps(t) for t in tasks):
        time.sleep(0.005)
    return [runs(t) for t in tasks]


def _sleeps(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_type", [2.0, 3.0, float("inf")])
@pytest.mark.parametrize("sizes", LISTS.values(), ids=LISTS)
def test_clipping_wakes_no_thread(workers, sizes, norm_type, dtype):
    parameters = [parameter(n, dtype=dtype) for n in sizes]
    before = settled(workers)
    for max_norm in (1e9, 1e-3):
        fastguard.clip_grad_norm_(parameters, max_norm, norm_type)
    assert settled(workers) == before


@pytest.mark.parametrize("n", [100, 5000])
def test_flat_buckets_wake_no_thread(workers, n):
    flat = fastguard.FlatGradBuckets([parameter(n) for _ in range(500_000 // n)])
    before = settled(workers)
    for max_norm in (1e9, 1e-3):
        flat.clip_grad_norm_(max_norm)
    flat.zero_()
    assert settled(workers) == before


def test_elementwise_operations_wake_no_thread(workers):
    parameters = [parameter(300_000), parameter(1000, 300)]
    for p in parameters:
        p.grad[0] = float("nan")
    before = settled(workers)
    fastguard.measure_grads(parameters, per_tensor=True)
    fastguard.clip_grad_value_(parameters, 1.0)
    fastguard.sanitize_grads_(parameters)
    fastguard.sanitize_grads_(parameters, nan=1.0)
    fastguard.clip_grad_norm_(parameters, 1.0, nonfinite="zero")
    assert settled(workers) == before


def test_pieces_hold_every_element_once():
    x = torch.arange(200_000.0)
    channels_last = x.view(2, 50, 40, 50).to(memory_format=torch.channels_last)
    with_holes = torch.zeros(300, 200)[:, ::2]
    tensors = [x, channels_last, with_holes, torch.zeros(3), torch.zeros(0), torch.zeros(())]
    pieces = in_pieces(tensors)
    for piece in pieces:
        piece.add_(1)
    assert x.equal(torch.arange(1.0, 200_001.0))
    assert channels_last.equal(torch.arange(1.0, 200_001.0).view(2, 50, 40, 50))
    assert with_holes.eq(1).all()
    assert sum(p.numel() for p in pieces) == sum(t.numel() for t in tensors)
    assert max(p.numel() for p in pieces if p.is_contiguous()) <= GRAIN
    assert in_pieces([torch.zeros(FEW)])[0].numel() == FEW
