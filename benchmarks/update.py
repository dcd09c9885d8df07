"""The fused update against the equivalent in torch, and against the bandwidth of a copy.

python -m benchmarks.update --out FILE
python -m benchmarks.update --device cpu --quick             # a trial of this script

AdamW over tensors of 16 M elements. All variants alternate in every round:

    fp32, bf16        the update, including the clip coefficient, against multiplying the gradients
                      and the fused AdamW of torch
    bf16, remainder   the same, against float32 copies of the weights kept by hand

Bytes per element: 28 (fp32), 14 (bf16), 26 (bf16 with a remainder). The limit is the bandwidth of a
copy, counting reads and writes. Targets: 90 % of that bandwidth, and 1.2 times the speed of torch
in bf16.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.script import commit, options
from fastguard.commands.bench.machine import describe_machine, versions
from fastguard.commands.bench.runner import Spread, rounds
from fastguard.optim import reference
from fastguard.optim.contract import Update

N_TENSORS, ELEMENTS = 16, 2**24
CASES = {"fp32": (torch.float32, 28), "bf16": (torch.bfloat16, 14), "remainder": (None, 26)}
LR, BETAS, EPS, DECAY = 1e-5, (0.9, 0.999), 1e-8, 1e-2


def update_of(device: torch.device, n: int, case: str) -> Update:
    """AdamW of tensors of n elements each."""
    dtype = CASES[case][0] or torch.bfloat16
    state = dtype if case != "remainder" else torch.float32
    master = "remainder" if case == "remainder" else None
    hyper = [[LR, *BETAS, EPS, DECAY, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]

    def several(kind: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, device=device).to(kind) for _ in range(N_TENSORS)]

    return Update(
        algorithm="adamw",
        parameters=several(dtype),
        grads=several(dtype),
        states={name: [x.abs() for x in several(state)] for name in ("exp_avg", "exp_avg_sq")},
        steps=[torch.ones((), device=device) for _ in range(N_TENSORS)],
        hyper=torch.tensor(hyper, dtype=torch.float64, device=device),
        group_ids=[0] * N_TENSORS,
        multiplier=torch.full((1,), 0.5, dtype=torch.float64, device=device),
        segment_ids=[0] * N_TENSORS,
        found_inf=torch.zeros((), device=device),
        clean=torch.zeros((), device=device),
        master=master,
        masters=[torch.zeros(n, dtype=torch.int16, device=device) for _ in range(N_TENSORS)]
        if master
        else (),
    )


def by_torch(one: Update, case: str) -> Callable[[], None]:
    """Returns the equivalent step, written by hand with torch."""
    exact = [p.float() if case == "remainder" else p.clone() for p in one.parameters]
    weights = [torch.nn.Parameter(p) for p in exact]
    optimizer = torch.optim.AdamW(
        weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )

    def step() -> None:
        torch._foreach_mul_(one.grads, 0.5)
        for weight, grad in zip(weights, one.grads, strict=True):
            weight.grad = grad.to(weight.dtype)
        optimizer.step()
        if case == "remainder":
            torch._foreach_copy_(one.parameters, [w.detach() for w in weights])

    return step


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the time from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(device: torch.device, n: int, case: str, seconds: float) -> dict:
    """Measures the row of a case."""
    one = update_of(device, n, case)
    source = torch.empty(N_TENSORS * n * CASES[case][1] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        from fastguard.optim import triton

        take = triton.update
    else:
        take = reference.update
    ways: dict[str, Callable[[], object]] = {
        "fastguard": lambda: take(one),
        "torch": by_torch(one, case),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        seconds_of(work, device)  # this call compiles kernels and creates state
    for order in rounds(ways, seconds):
        for name in order:
            times[name].append(seconds_of(ways[name], device))
    ratio = [t / o for t, o in zip(times["torch"], times["fastguard"], strict=True)]
    bandwidth = [c / o for c, o in zip(times["copy"], times["fastguard"], strict=True)]
    return {
        "case": case,
        "ms": {name: Spread.of([1e3 * t for t in own]).p50 for name, own in times.items()},
        "times_torch": Spread.of(ratio).p50,
        "of_a_copy": Spread.of(bandwidth).p50,
    }


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = options("update", __doc__, quick="small tensors", seconds=4.0, what="per case ")
    if args is None:
        return 2
    n = 2**12 if args.quick else ELEMENTS
    rows = []
    for case in CASES:
        rows.append(measured(args.device, n, case, args.seconds))
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            machine = describe_machine(args.device)
            document = {
                "machine": machine,
                "versions": versions(),
                "commit": commit(),
                "rows": rows,
            }
            args.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
