"""The cost of features around the step: records, losses, snapshots, activation guards.

    python -m benchmarks.beside [records] [growth] [snapshot] [activations] [ranks] [busy] [units]

Two variants run alternately, since machines are shared. The result is the median of the ratios of
the pairs; for records, it is the median of the differences in microseconds, with quartiles (20 µs
are 2 % of a 1 ms step). Everything runs on the CPU.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastguard
from benchmarks.suite import model_shapes
from fastguard.ranks.lockstep import Peers
from fastguard.recovery.incident_log import Moment
from fastguard.recovery.snapshot_stores import InMemory

Work = Callable[[], object]
FETCHED = 20
"""Number of steps between two calls of `records()`."""


def seconds(work: Work, repeat: int = 1) -> float:
    """Returns the mean time of a call."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - start) / repeat


def in_turns(one: Work, other: Work, *, pairs: int, repeat: int = 1) -> list[tuple[float, float]]:
    """Returns the seconds of both variants for each pair, without a first pair as warm-up."""
    times = [(seconds(one, repeat), seconds(other, repeat)) for _ in range(pairs + 1)]
    return times[1:]


def ratio(times: list[tuple[float, float]]) -> float:
    """Returns the median over the pairs of the second time divided by the first."""
    return statistics.median(b / a for a, b in times)


def guarded(n_elements: int, **settings: Any) -> fastguard.GuardedOptimizer:
    """Returns a guarded AdamW with ten parameters that have gradients."""
    parameters = [torch.nn.Parameter(torch.zeros(n_elements // 10)) for _ in range(10)]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    return fastguard.GuardedOptimizer(
        torch.optim.AdamW(parameters, lr=1e-6, fused=True), max_norm=1.0, **settings
    )


def step_of_one_ms() -> int:
    """Returns the number of elements for which a guarded AdamW step takes about 1 ms here."""
    n = 100_000
    opt = guarded(n)
    took = statistics.median(seconds(opt.step, 20) for _ in range(20))
    while took < 0.95e-3:
        n = int(n * min(2.0, 1.05e-3 / took)) + 10
        opt = guarded(n)
        took = statistics.median(seconds(opt.step, 20) for _ in range(20))
    return n


def records() -> None:
    """Measures records, losses and a sink against the same step without them, on one thread.

    One optimizer takes all steps, so that all variants use the same memory: two models of the same
    size differ by tens of microseconds per step. The first variant runs twice, and the difference
    is the noise. Records are fetched every `FETCHED` steps, as a progress bar would do.
    """
    # one thread, since waiting for a core would take longer than the differences
    torch.set_num_threads(1)
    n = step_of_one_ms()
    opt = guarded(n)
    recorder, add = opt._recorder, opt._recorder.add
    losses = {name: torch.tensor(0.5) for name in ("seg", "prior", "aux")}

    def steps(keeps: bool, loss: Any = None, sinks: Sequence[Any] = ()) -> Callable[[], float]:
        def microseconds() -> float:
            recorder.add = add if keeps else lambda _: None  # type: ignore[method-assign]
            recorder.sinks = list(sinks)
            opt.step(loss=loss)  # warm-up, since the previous step was of another variant
            opt.records()
            times = [seconds(lambda: opt.step(loss=loss)) for _ in range(FETCHED)]
            fetching = seconds(opt.records)  # creates the records
            return (statistics.median(times) + fetching / FETCHED) * 1e6

        return microseconds

    with tempfile.TemporaryDirectory() as folder:
        sink = fastguard.JsonLinesSink(Path(folder) / "records.jsonl")
        ways = {
            "without records": steps(False),
            "the same again": steps(False),
            "a record": steps(True),
            "three losses": steps(False, losses),
            "a record and three losses": steps(True, losses),
            "a record, three losses, a line of JSON": steps(True, losses, [sink]),
        }
        rounds = all_in_turns(ways, rounds=480)
    base, *others = ways
    step = statistics.median(each[base] for each in rounds)
    print(f"guarded step of {n:,} elements without records: {step / 1e3:.2f} ms")
    for name in others:
        low, added, high = statistics.quantiles((each[name] - each[base] for each in rounds), n=4)
        share = added / step * 100
        print(f"  {name}: {added:+.1f} µs ({low:+.1f} to {high:+.1f}), {share:+.1f} %")


def all_in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Returns the values of all variants for each round; each round has a random order.

    The first round is a warm-up and left out.
    """
    order, draws = list(ways), random.Random(0)
    measured = []
    for _ in range(rounds + 1):
        draws.shuffle(order)
        measured.append({name: ways[name]() for name in order})
    return measured[1:]


def growth() -> None:
    """Measures late steps of a run that never fetches records, compared with steps of a new run."""
    torch.set_num_threads(1)
    long = guarded(10_000)
    for _ in range(50_000):
        long.step(loss=0.5)
    fresh = guarded(10_000)
    times = in_turns(
        lambda: fresh.step(loss=0.5), lambda: long.step(loss=0.5), pairs=101, repeat=20
    )
    held = len(long._recorder.finished)
    print(f"after 50,000 steps: {ratio(times):.3f} of a first step, {held} records held")


def snapshot() -> None:
    """Measures a snapshot of gpt2-124m with its AdamW state against a copy of the same bytes."""
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(s)) for s in gpt2())
    opt = fastguard.GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True))
    for p in model:
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad()
    tensors = [*model, *(t for state in opt.state.values() for t in state.values())]
    buffers = [torch.empty_like(t) for t in tensors]

    def plain() -> None:
        with torch.no_grad():
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor)

    place = InMemory(opt, 2, Peers())
    objects = {"model": model, "optimizer": opt}
    steps = itertools.count(1)

    def take() -> None:
        place.take(objects, Moment(0, next(steps)), None)

    take()
    take()  # the first two snapshots allocate buffers
    pairs = in_turns(plain, take, pairs=22)
    gb = sum(t.nbytes for t in tensors) / 1e9
    copy = statistics.median(a for a, _ in pairs)
    print(f"plain copy of {gb:.2f} GB: {copy * 1e3:.0f} ms")
    # Snapshots alternate between checking most of the tensors during the copy, and checking the
    # rest.
    for name, times in (("first", pairs[::2]), ("second", pairs[1::2])):
        print(f"  each {name} snapshot: {ratio(times):.3f} of it")


def gpt2() -> list[tuple[int, ...]]:
    """Returns the shapes of gpt2-124m."""
    return [tuple(shape) for shape in model_shapes("gpt2-124m")]


def activations() -> None:
    """Measures forward and backward of a small transformer with and without `ActivationGuard`."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(8, 128, 256)

    def step() -> None:
        model(x).square().mean().backward()

    for mode in ("count", "clean"):

        def watched(mode: Any = mode) -> None:
            with fastguard.ActivationGuard(model, mode=mode):
                step()

        times = in_turns(step, watched, pairs=31)
        base = statistics.median(a for a, _ in times) * 1e3
        print(f"ActivationGuard({mode!r}), all modules: {ratio(times):.3f} of {base:.0f} ms")


def ranks() -> None:
    """Measures a DDP step on one rank with and without `RankWatch`."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(64, 1024)
        steps = []
        for watched in (False, True):
            torch.manual_seed(0)
            net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
            model = torch.nn.parallel.DistributedDataParallel(net)
            opt = fastguard.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-9))
            if watched:
                fastguard.RankWatch(opt, model)

            def step(model: Any = model, opt: Any = opt) -> None:
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()

            steps.append(step)
        times = in_turns(*steps, pairs=31)
        base = statistics.median(a for a, _ in times) * 1e3
        print(f"RankWatch: {ratio(times):.3f} of a DDP step of {base:.0f} ms with 8M parameters")
    finally:
        dist.destroy_process_group()


def busy() -> None:
    """Measures clipping against torch while other processes keep all cores busy.

    The threads of a parallel loop wait for the last thread, which waits for a core.
    """
    lists = {
        "29 tensors of 0.5 MB": ([(4500,)] * 29, torch.float32),
        "29 tensors of 0.3 MB, bfloat16": ([(4500,)] * 29, torch.bfloat16),
        "400 tensors of 5 MB": ([(16, 27), (16,), (64, 64, 3), (96, 96)] * 100, torch.float32),
        "2000 x 1k": ([(1000,)] * 2000, torch.float32),
        "1000 x 10k": ([(100, 100)] * 1000, torch.float32),
        "yolo11n": (model_shapes("yolo11n"), torch.float32),
    }
    threads = torch.get_num_threads()
    loop = [sys.executable, "-c", "while True: pass"]
    for n_busy in (0, os.cpu_count() or 1):
        others = [subprocess.Popen(loop) for _ in range(n_busy)]
        try:
            for n in sorted({threads, 1}, reverse=True):
                torch.set_num_threads(n)
                print(f"{n_busy} other busy processes, {n} threads, nothing to clip and clipping:")
                for name, gradients in lists.items():
                    unclipped, clipped = (_against_torch(*gradients, x) for x in (1e9, 1.0))
                    print(f"  {name}: {unclipped}; {clipped}")
        finally:
            for other in others:
                other.kill()
                other.wait()


def _against_torch(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, max_norm: float) -> str:
    """Measures clipping gradients of these shapes, by torch and fastguard alternately."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    pristine = [torch.randn(shape).to(dtype) for shape in shapes]
    for p in parameters:
        p.grad = torch.empty_like(p)

    def seconds_of(clip: Callable[..., Any]) -> float:
        torch._foreach_copy_([p.grad for p in parameters], pristine)
        return seconds(lambda: clip(parameters, max_norm))

    pairs = [
        (seconds_of(torch.nn.utils.clip_grad_norm_), seconds_of(fastguard.clip_grad_norm_))
        for _ in range(42)
    ][1:]
    a, b = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
    return f"torch {a:.2f} ms, fastguard {b:.2f} ms, {1 / ratio(pairs):.2f}x"


def units() -> None:
    """Measures adaptive gradient clipping of models: the formula per tensor, and fastguard."""
    threads = torch.get_num_threads()
    for n in sorted({1, threads}):
        torch.set_num_threads(n)
        print(f"units: adaptive gradient clipping, {n} threads, formula and fastguard, alternating")
        for name in ("resnet50", "yolo11n", "vit-b16"):
            parameters = [torch.nn.Parameter(torch.randn(s) * 0.05) for s in model_shapes(name)]
            for scale, what in ((1e-5, "nothing to clip"), (1e-1, "all units clipped")):
                pristine = [torch.randn_like(p) * scale for p in parameters]
                ways = by_units, fastguard.clip_grad_adaptive_
                pairs = [
                    tuple(_clipping_seconds(way, parameters, pristine) for way in ways)
                    for _ in range(16)
                ][1:]
                a, b = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
                print(f"  {name}, {what}: {a:.1f} and {b:.1f} ms, {1 / ratio(pairs):.2f}x")


def by_units(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Applies the formula of arXiv 2102.06171 in torch, tensor by tensor, as timm does."""
    with torch.no_grad():
        for p in parameters:
            assert p.grad is not None
            dims = tuple(range(1, p.dim())) or None
            limit = p.norm(2.0, dim=dims, keepdim=True).clamp(min=1e-3) * 0.01
            norm = p.grad.norm(2.0, dim=dims, keepdim=True)
            clipped = p.grad * (limit / norm.clamp(min=1e-6))
            p.grad.copy_(torch.where(norm > limit, clipped, p.grad))


def _clipping_seconds(
    clip: Callable[..., Any],
    parameters: Sequence[torch.nn.Parameter],
    pristine: Sequence[torch.Tensor],
) -> float:
    """Returns the seconds of a call with newly allocated gradients, as a backward pass makes."""
    for p, grad in zip(parameters, pristine, strict=True):
        p.grad = grad.clone()
    return seconds(lambda: clip(parameters))


PARTS = {f.__name__: f for f in (records, growth, snapshot, activations, ranks, busy, units)}


def main(names: list[str]) -> int:
    """Runs the parts with these names, or all; returns the exit status."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    threads = torch.get_num_threads()
    for name in names or PARTS:
        PARTS[name]()
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
