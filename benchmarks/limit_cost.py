"""Host time that adaptive limits add to the decision of a step on a CPU, for one segment.

    python -m benchmarks.limit_cost

Decides the same norms with each rule in turn, in rounds, as within a guarded step (every change can
be undone). Prints the 20th percentile over the rounds, its difference from a fixed limit, and the
ratio. The windows of `AutoClip` are full, which is the slowest case.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from fastguard import AdaGC, AutoClip, ZClip
from fastguard.guard.clip_scope import Limit, policy_of
from fastguard.stages.contract import GuardState, Signals
from fastguard.stages.decide import decide
from fastguard.stages.grad_stats import GradStats

ROUNDS, STEPS = 300, 50
CPU = torch.device("cpu")
LIMITS: dict[str, Limit] = {
    "max_norm=1.0": 1.0,
    "ZClip()": ZClip(),
    "AdaGC()": AdaGC(),
    "AutoClip(window=1000)": AutoClip(window=1_000),
    "AutoClip()": AutoClip(),
}


def stats_of(norm: float) -> GradStats:
    """Returns the stats of finite gradients with this norm."""
    summary = torch.zeros(4, 1, dtype=torch.float64)
    summary[0] = norm * norm
    return GradStats(summary, summary[1:].long(), 2.0)


def rounds_of(limit: Limit) -> Callable[[], float]:
    """Returns a function that decides `STEPS` steps and returns the time per step in µs."""
    policy = policy_of((limit,), "global", 2.0, 1, CPU, "skip", {})
    state, signals = GuardState.fresh(policy, CPU), Signals.none(CPU)
    chance = random.Random(0)
    if isinstance(limit, AutoClip):
        for _ in range(limit.window):
            decide(stats_of(0.5 + chance.random()), signals, state, policy)
    steps = [stats_of(0.5 + chance.random()) for _ in range(STEPS)]

    def run() -> float:
        start = time.perf_counter()
        for stats in steps:
            state.undo = []
            decide(stats, signals, state, policy)
        return (time.perf_counter() - start) / STEPS * 1e6

    return run


def main() -> None:
    """Prints one line per limit."""
    torch.set_num_threads(1)
    runs = {name: rounds_of(limit) for name, limit in LIMITS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run())
    p20 = {name: sorted(values)[ROUNDS // 5] for name, values in times.items()}
    fixed = p20["max_norm=1.0"]
    for name, value in p20.items():
        print(f"{name:22} {value:6.2f} µs  +{value - fixed:5.2f} µs  x {value / fixed:.3f}")


if __name__ == "__main__":
    main()
