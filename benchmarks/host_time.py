"""Host time of a guarded step with the Triton kernels, measured without a GPU.

    python -m benchmarks.host_time [--tensors 2000] [--elements 1000] [--rounds 20] [--cold]

Runs the Python code of a step on a GPU (`fastguard.stages.triton`, `fastguard.kernels`) with
gradients on the CPU. Every kernel launch returns at once, so no gradient is read, and the numbers
of a step mean nothing. Each step gets new gradient tensors: at the addresses of the previous step
("same addresses"), or at addresses whose table is no longer cached ("new addresses").

For each case, prints the host time per step in µs (median, 20th percentile and mean), and the share
of each stage. The shares come from separate steps with a clock around each stage, and exclude
stages that run inside another stage. Steps run back to back, so the CPU caches are warm; `--cold`
empties the caches before each step, which is closer to training, where the backward pass runs
between two steps.

For the time of the guard, the `step` of the wrapped optimizer, a fused AdamW, returns at once. The
time "with torch's step" includes the Python code of that `step`, whose fused kernel alone returns
at once. Its operations on the step counts remain; on a CPU, torch runs these operations tensor by
tensor.

The result does not include the time of the driver on a GPU: launches (including launches of the
fused optimizer), copies and pinned memory of uploads, allocations, events, and queries of the
current stream. The record of the previous step has always arrived. `StepRecord`s are made for 32
steps at a time, so the mean includes their time and the median does not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # set before triton is imported, so that no driver is needed

import torch
from torch import Tensor

import fastguard
from fastguard.errors.logger import log
from fastguard.guard.flat_parameters import FlatParameters
from fastguard.kernels.chunks import TABLES
from fastguard.kernels.launch import Variant
from fastguard.kernels.record_row import CULPRITS_END
from fastguard.records.device_row import Ring
from fastguard.stages import backend
from fastguard.stages import triton as triton_stages

CPU = torch.device("cpu")
STAGES = {
    "changed parameters": ["guard.guarded.GuardedOptimizer._follow_parameters"],
    "gradients and their layout": ["guard.param_gradients.Gradients.buckets"],
    "measure": ["guard.guarded.measure"],
    "chunk table": ["stages.triton.table_of"],
    "decide": ["guard.guarded.decide"],
    "apply": ["guard.on_device.apply"],
    "version counters": [
        "stages.triton.increment_version",
        "guard.flat_parameters.increment_version",
    ],
    "runs in place of parameters": [
        "guard.flat_parameters.FlatParameters._show_runs",
        "guard.flat_parameters.FlatParameters.show_parameters",
    ],
    "record": ["records.recorder.Recorder.add"],
}
"""The functions of each stage; names begin with `fastguard`."""

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "same addresses": (1, {}),
    "new addresses": (TABLES + 2, {}),
    "flat_buckets=True": (0, {"flat_buckets": True}),
    'flat_buckets="trusted"': (0, {"flat_buckets": "trusted"}),
    "flat_parameters=True": (0, {"flat_parameters": True}),
    'flat_parameters="trusted"': (0, {"flat_parameters": "trusted"}),
}
"""Arguments of `Case`."""

GUARD, WHOLE, REST = "guard", "with torch's step", "all else"
STEPS = 9  # steps of one kind in a row; the first step is left out
EVICTED: Tensor | None = None  # written before each step to empty the caches


class Clock:
    """Adds up the time of each stage, without the stages that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # per active stage, the time of the stages that it has called

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that adds its time to a stage."""

        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[stage] += took - self._inner.pop()
                self._inner[-1] += took

        return run

    @contextmanager
    def around_stages(self) -> Iterator[None]:
        """Context in which every stage is timed."""
        with ExitStack() as patches:
            for stage, places in STAGES.items():
                for place in places:
                    owner, name = owner_of(f"fastguard.{place}")
                    work = self.timed(stage, getattr(owner, name))
                    patches.enter_context(mock.patch.object(owner, name, work))
            yield


def owner_of(place: str) -> tuple[Any, str]:
    """Returns the module or class that holds a function, and the function's name in it."""
    parent, _, name = place.rpartition(".")
    if parent.rpartition(".")[2][0].isupper():  # the parent is a class
        module, _, kind = parent.rpartition(".")
        return getattr(import_module(module), kind), name
    return import_module(parent), name


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Context in which CPU tensors use the code of the kernels, and launches return at once."""
    with (
        mock.patch.object(backend, "stages", lambda *_: triton_stages),
        mock.patch.object(Variant, "__call__", lambda *_: None),
        mock.patch.object(FlatParameters, "on_host", False),
        mock.patch.object(torch, "_fused_adamw_", lambda *_, **__: None),
    ):
        yield


class Case:
    """One way to guard the same parameters.

    Args:
        sizes: Number of elements of each parameter.
        n_places: Number of lists of addresses that the gradients take in turn; 0: the gradients
            remain in their flat buckets.
        settings: Arguments of `GuardedOptimizer`.
    """

    def __init__(self, sizes: Sequence[int], n_places: int, **settings: Any) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
        places = [[torch.zeros(n) for n in sizes] for _ in range(n_places)]
        self._places = itertools.cycle(places or [[]])
        self._inner = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        self._opt = fastguard.GuardedOptimizer(self._inner, max_norm=1.0, **settings)
        # Fills the rows with steps without an incident, since no kernel writes them.
        self._opt._recorder._ring = ring = Ring(CPU, CULPRITS_END)
        torch._foreach_zero_(ring._rows)
        self._seconds()  # creates the state of the optimizer
        self._torchs_step = self._inner.step

    def _seconds(self) -> float:
        """Takes a step and returns its time."""
        for p, place in zip(self.parameters, next(self._places), strict=False):
            p.grad = place.data  # a new tensor at the same address, with its own version counter
        if EVICTED is not None:
            EVICTED.add_(1)
        start = time.perf_counter()
        self._opt.step()
        return time.perf_counter() - start

    def times(self) -> list[dict[str, float]]:
        """Takes `STEPS` steps of each kind, one kind after the other.

        Returns:
            For each of the steps except the first of its kind: the seconds of the guard, of the
            guard and torch's step, and of each stage.
        """
        clock, found = Clock(), []
        self._inner.step = lambda: None  # type: ignore[method-assign,assignment]
        guard = [self._seconds() for _ in range(STEPS)]
        with clock.around_stages():
            for _ in range(STEPS):
                clock.seconds.clear()
                took = self._seconds()
                found.append({**clock.seconds, REST: took - sum(clock.seconds.values())})
        self._inner.step = self._torchs_step  # type: ignore[method-assign]
        whole = [self._seconds() for _ in range(STEPS)]
        each = zip(guard, whole, found, strict=True)
        return [{GUARD: g, WHOLE: w, **stages} for g, w, stages in each][1:]


def main() -> None:
    """Prints the host time of each case."""
    global EVICTED
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--elements", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cold", action="store_true", help="empty the caches before each step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log.setLevel("WARNING")
    EVICTED = torch.zeros(1 << 24) if args.cold else None
    print(f"{args.tensors} tensors of {args.elements} floats, torch {torch.__version__}")
    with as_on_a_gpu():
        sizes = [args.elements] * args.tensors
        cases = {name: Case(sizes, n, **settings) for name, (n, settings) in WAYS.items()}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for i in range(args.rounds + 1):
            for name, case in cases.items():
                found = case.times()
                times[name] += found if i else []  # the first round is a warm-up
    for name in cases:
        show(name, times[name])


def show(name: str, times: Sequence[dict[str, float]]) -> None:
    """Prints one case."""
    us = {
        key: [each.get(key, 0.0) * 1e6 for each in times] for key in (GUARD, WHOLE, *STAGES, REST)
    }
    median = {key: statistics.median(values) for key, values in us.items()}
    p20, mean = sorted(us[GUARD])[len(times) // 5], statistics.mean(us[GUARD])
    print(
        f"{name}: guard {median[GUARD]:.0f} µs (p20 {p20:.0f}, mean {mean:.0f}), "
        f"with torch's step {median[WHOLE]:.0f} µs"
    )
    whole = sum(median[stage] for stage in (*STAGES, REST))
    for stage in (*STAGES, REST):
        if median[stage] > 0.0:
            print(f"    {median[stage]:6.1f} µs {median[stage] / whole:4.0%}  {stage}")


if __name__ == "__main__":
    main()
