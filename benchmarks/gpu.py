"""The kernels' targets on one GPU: measured, beside what they should be.

python -m benchmarks.gpu --out benchmarks/results/gpu.json
python -m benchmarks.gpu --device cpu --quick        # tries the script itself; no number means much

Bytes: a read pass moves N, clipping 3N (a read, then a read and a write), torch's clipping always
3N. Every ratio is of two contenders that take turns in one process, each call with caches emptied
before; figures are medians. Host time is until the call returns, device time excludes the wait for
launches. The file is written anew after each case, so that a run that is cut off leaves what it
has. COMMIT=... names the source where there is no .git.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastguard
from fastguard.bench.clock import Clock, Sample
from fastguard.bench.machine import Evictor, ceilings, commit, describe_machine, versions
from fastguard.buckets import bucketize
from fastguard.files import written
from fastguard.measure import measure

SHAPES = Path(__file__).parent / "shapes"
Call = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One line of the table: `measured` is to be at least (`>=`) or at most (`<=`) `target`."""

    case: str
    unit: str
    relation: str
    target: float
    measured: float
    detail: dict[str, float]

    @property
    def met(self) -> bool:
        if self.relation == ">=":
            return self.measured >= self.target
        return self.measured <= self.target


class Bench:
    """What all cases share: the device, a clock, an evictor and how often each call is timed."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device = device
        self.clock = Clock(device)
        self.evict = Evictor(device)
        self.rounds = 3 if quick else 15
        self.scale = 2**-8 if quick else 1.0  # of the large sizes

    def interleaved(self, calls: dict[str, Call], prepare: Call | None = None) -> dict[str, Sample]:
        """Medians of contenders that take turns."""

        def before() -> None:
            if prepare:
                prepare()
            self.evict()

        for call in calls.values():  # compiles, builds tables
            for _ in range(3):
                before()
                call()
        samples: dict[str, list[Sample]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                samples[name].append(self.clock.sample(call, before))
        return {name: _median(found) for name, found in samples.items()}

    def gradients(self, n_bytes: float, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
        size = max(1, int(n_bytes * self.scale) // dtype.itemsize // n)
        return [torch.randn(size, device=self.device).to(dtype) for _ in range(n)]


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(*(statistics.median(column) for column in zip(*samples, strict=True)))


def parameters_with(grads: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    parameters = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.empty(0, dtype=grad.dtype, device=grad.device))
        parameter.data = grad.detach()  # its values do not matter: no second copy of a large model
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def clippers(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> dict[str, Call]:
    return {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True),
        "fastguard": lambda: fastguard.clip_grad_norm_(parameters, max_norm),
    }


def read_pass(bench: Bench, dtype: torch.dtype, read_gb_s: float) -> Result:
    grads = bench.gradients(2**29, dtype, 8)
    n_bytes = sum(g.nbytes for g in grads)
    buckets = bucketize(grads)
    sample = bench.interleaved({"measure": lambda: measure(buckets)})["measure"]
    gb_s = n_bytes / sample.work_ms / 1e6
    detail = {"gb_s": gb_s, "ceiling_gb_s": read_gb_s, "device_ms": sample.device_ms}
    name = f"read pass, 512 MB, {str(dtype).removeprefix('torch.')}"
    return Result(name, "of the read ceiling", ">=", 0.92, gb_s / read_gb_s, detail)


def ratio(bench: Bench, case: str, target: float, calls: dict[str, Call], prepare=None) -> Result:
    """How many times faster than torch, from call to finished result."""
    samples = bench.interleaved(calls, prepare)
    detail = {
        f"{name}_{what}_ms": getattr(sample, f"{what}_ms")
        for name, sample in samples.items()
        for what in ("wall", "host", "device")
    }
    measured = samples["torch"].wall_ms / samples["fastguard"].wall_ms
    return Result(case, "x torch", ">=", target, measured, detail)


def nothing_to_clip(bench: Bench) -> Result:
    parameters = parameters_with(bench.gradients(2**30, torch.float32, 16))
    return ratio(bench, "nothing to clip, 1 GB fp32", 2.8, clippers(parameters, 1e9))


def clipping(bench: Bench) -> Result:
    grads = bench.gradients(2**30, torch.float32, 16)
    parameters = parameters_with(grads)

    def restore() -> None:  # large again, so that every call clips
        for grad in grads:
            grad.fill_(1.0)

    return ratio(bench, "clipping, 1 GB fp32", 1.1, clippers(parameters, 1.0), restore)


def llama(bench: Bench) -> Result:
    model = json.loads((SHAPES / "llama-3.2-1b.json").read_text())
    shapes = [shape for _, shape in model["parameters"]]
    if bench.scale < 1:
        shapes = [[max(1, n // 16) for n in shape] for shape in shapes]
    grads = [torch.randn(s, device=bench.device, dtype=torch.bfloat16) for s in shapes]
    return ratio(bench, "llama-3.2-1b, bf16", 3.0, clippers(parameters_with(grads), 1e9))


def many_small(bench: Bench) -> list[Result]:
    n = 2000
    parameters = parameters_with([torch.randn(1000, device=bench.device) for _ in range(n)])
    twins = [[torch.nn.Parameter(p.detach().clone()) for p in parameters] for _ in range(2)]
    for twin in twins:
        for t, p in zip(twin, parameters, strict=True):
            assert p.grad is not None
            t.grad = p.grad.clone()
    checked = fastguard.FlatGradBuckets(twins[0])
    trusted = fastguard.FlatGradBuckets(twins[1], trusted=True)
    buckets = bucketize([p.grad for p in parameters])
    samples = bench.interleaved(
        clippers(parameters, 1e9)
        | {
            "flat": lambda: checked.clip_grad_norm_(1e9),
            "flat_trusted": lambda: trusted.clip_grad_norm_(1e9),
            "measure": lambda: measure(buckets),
        }
    )
    us = {name: sample.host_ms * 1e3 for name, sample in samples.items()}
    case = "host time, 2000 tensors of 1k"
    return [
        Result(case, "µs", "<=", 300, us["fastguard"], us),
        Result(f"{case}: torch's", "x ours", ">=", 10, us["torch"] / us["fastguard"], us),
        Result(f"{case}, flat", "µs", "<=", 40 + 0.1 * n, us["flat"], us),
        Result(f"{case}, flat and trusted", "µs", "<=", 40, us["flat_trusted"], us),
    ]


def guarded_step(bench: Bench, read_gb_s: float) -> Result:
    """AdamW(fused) with a skip guard, against the bare step plus one read of the gradients."""
    grads = bench.gradients(2**29, torch.float32, 16)
    inner = [torch.optim.AdamW(parameters_with(grads), fused=True) for _ in range(2)]
    guarded = fastguard.GuardedOptimizer(inner[1], nonfinite="skip")
    samples = bench.interleaved({"bare": inner[0].step, "guarded": guarded.step})
    one_read = sum(g.nbytes for g in grads) / read_gb_s / 1e6
    extra = samples["guarded"].device_ms - samples["bare"].device_ms
    detail = {name: sample.device_ms for name, sample in samples.items()} | {"read_ms": one_read}
    return Result("guarded AdamW step, extra", "reads", "<=", 1.15, extra / one_read, detail)


def syncs(bench: Bench) -> Result:
    """Calls of a guarded step that torch says would wait for the device."""
    parameters = parameters_with(bench.gradients(2**24, torch.float32, 16))
    guarded = fastguard.GuardedOptimizer(
        torch.optim.AdamW(parameters, fused=True), max_norm=1.0, nonfinite="skip"
    )
    for _ in range(3):
        guarded.step()
    found = 0
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            guarded.step()
        except RuntimeError as error:
            found = 1
            print(f"a guarded step waited: {error}", file=sys.stderr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Result("host waits for the device in a guarded step", "", "<=", 0, found, {})


def cases_of(bench: Bench) -> dict[str, Callable[[float], Result | list[Result]]]:
    """The cases by name, as functions of how many GB/s can be read."""
    return {
        "read-fp32": lambda read_gb_s: read_pass(bench, torch.float32, read_gb_s),
        "read-bf16": lambda read_gb_s: read_pass(bench, torch.bfloat16, read_gb_s),
        "unclipped": lambda _: nothing_to_clip(bench),
        "clipped": lambda _: clipping(bench),
        "llama": lambda _: llama(bench),
        "small": lambda _: many_small(bench),
        "step": lambda read_gb_s: guarded_step(bench, read_gb_s),
        "syncs": lambda _: syncs(bench),
    }


def header(device: torch.device) -> dict[str, Any]:
    """What a reader of the numbers must know, before there are any."""
    return {
        "machine": describe_machine(device),
        "versions": versions(),
        "commit": os.environ.get("COMMIT") or commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "backend": fastguard.backend_for(torch.zeros(1, device=device)),
        "results": [],
        "failures": {},
    }


def measure_all(document: dict[str, Any], device: torch.device, quick: bool, save: Call) -> None:
    """Runs all cases and puts their results, or why there are none, into the document."""
    start = time.perf_counter()
    save()
    limit = ceilings(device, n_bytes=2**24 if quick else None)
    document["ceilings"] = asdict(limit)
    print(f"ceilings: {limit}", flush=True)
    for name, case in cases_of(Bench(device, quick=quick)).items():
        try:
            found = case(limit.read_gb_s)
        except Exception as error:  # the others are worth having; this one is reported and fails
            document["failures"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            found = []
        for result in found if isinstance(found, list) else [found]:
            document["results"].append(asdict(result) | {"met": result.met})
            print(_line(result), flush=True)
        document["seconds"] = round(time.perf_counter() - start, 1)
        save()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device: --device cpu --quick tries the script", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    document = header(device)

    def save() -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with written(args.out) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n")

    measure_all(document, device, args.quick, save)
    return 1 if document["failures"] else 0


def _line(result: Result) -> str:
    number = f"{result.measured:.3g}" if math.isfinite(result.measured) else "-"
    verdict = "met" if result.met else "MISSED"
    wanted = f"{result.relation} {result.target:g} {result.unit}"
    return f"{result.case:52} {wanted:28} {number:>8}  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
