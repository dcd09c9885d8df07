"""Time that each watched quantity adds to a step, in passes of the measuring stage.

    python -m benchmarks.watch_cost

Runs guarded steps with and without the quantity in turn, on one thread; the median of their
differences is divided by the median time of `measure_grads`. The optimizer is SGD with a learning
rate of 0, or `fastguard.optim.SGD` where the table says so. Replica drift needs several ranks, so
its checksums are timed alone: they are all that it adds, apart from 96 bytes in the collective.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch

import fastguard
from fastguard.guard.watch.replica_drift import checksum

Call = Callable[[], object]

MODELS = {"24 large tensors": (24, 2**20), "1000 small": (1000, 4000), "8 tiny": (8, 1000)}
ROWS = {
    "tensor_norms": ("tensor_norms", torch.optim.SGD),
    "underflow": ("underflow", torch.optim.SGD),
    "replica_drift": ("replica_drift", torch.optim.SGD),
    "update_ratio": ("update_ratio", torch.optim.SGD),
    "update_ratio, fastguard.optim": ("update_ratio", fastguard.optim.SGD),
}
SECONDS = 3.0
"""Time per entry of the table."""


def calls_of(row: str, n: int, size: int) -> tuple[Call, Call, Call]:
    """Returns what is timed for n float32 tensors of this size.

    Returns:
        A step with the quantity, one without it, and the measuring pass.
    """
    quantity, sgd = ROWS[row]
    params = [torch.nn.Parameter(torch.randn(size)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(size)
    grads = [p.grad for p in params if p.grad is not None]

    def step(watch: tuple[str, ...]) -> Call:
        optimizer = sgd(params, lr=0.0)
        return fastguard.GuardedOptimizer(optimizer, watch=watch, watch_every=1).step

    def checksums() -> None:
        cpu = torch.device("cpu")
        checksum(grads, cpu), checksum(params, cpu)

    def nothing() -> None:
        pass

    def measure() -> object:
        return fastguard.measure_grads(params)

    if quantity == "replica_drift":
        return checksums, nothing, measure
    return step((quantity,)), step(()), measure


def cost_of(row: str, n: int, size: int, seconds: float) -> float:
    """Returns the added time as a multiple of the measuring pass."""
    calls = calls_of(row, n, size)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        rounds.append(list(map(_time_of, calls)))
    added = statistics.median(watched - bare for watched, bare, _ in rounds)
    return added / statistics.median(measuring for *_, measuring in rounds)


def _time_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Prints one row per quantity."""
    torch.set_num_threads(1)
    logging.getLogger("fastguard").setLevel(logging.WARNING)
    print(f"{'':32}" + "".join(f"{name:>18}" for name in MODELS))
    for row in ROWS:
        costs = [cost_of(row, n, size, SECONDS) for n, size in MODELS.values()]
        print(f"{row:32}" + "".join(f"{cost:18.2f}" for cost in costs), flush=True)


if __name__ == "__main__":
    main()
