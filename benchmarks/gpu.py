"""Measures the cases of the GPU targets in two minutes, the most important cases first.

python -m benchmarks.gpu --out benchmarks/results/gpu.json
python -m benchmarks.gpu --device cpu --quick        # a trial of this script, on 1/256 of the size

Runner, byte models, targets and the format of the file are shared with the whole suite
(`fastguard.commands.bench`). The file is rewritten after each case, and lists cases for which no
time was left. COMMIT=... names the source if there is no .git. The measured values of missed
targets are written too. The exit status is 1 if a case failed, or if a guarded step synced with the
device.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.contenders import READ_PASS
from benchmarks.script import commit, options
from benchmarks.suite import EXTREMES, ONE_GB, model_shapes
from benchmarks.syncs import count_syncs
from benchmarks.targets import judge, target_table
from fastguard.commands.bench.command import wide_console
from fastguard.commands.bench.machine import Ceilings, ceilings
from fastguard.commands.bench.results import Result, new_result, save
from fastguard.commands.bench.runner import run_case
from fastguard.commands.bench.selection import USUAL_STEP
from fastguard.commands.bench.table import row_table
from fastguard.commands.bench.workload import Case
from fastguard.commands.terminal import incidents_unlogged

SECONDS = 110.0  # no case starts after this time; the last case may take ten more seconds
CASE_SECONDS = 4.0
CLIP = ("torch foreach", "fastguard")
STEP = ("bare step", USUAL_STEP, "GuardedOptimizer")


def cases() -> list[Case]:
    """Returns the cases, the most important first; the last cases are left out if time is short."""
    one, small, gpt2 = ONE_GB["1 x 256M"], EXTREMES["2000 x 1k"], model_shapes("gpt2-124m")
    adamw = ("AdamW", "fused")
    return [
        Case("1 x 256M", one, (*CLIP, READ_PASS)),
        Case("1 x 256M", one, (*CLIP, READ_PASS), dtype="bf16"),
        Case("1 x 256M", one, CLIP, situation="clipping"),
        Case("gpt2-124m", gpt2, STEP, USUAL_STEP, optimizer=adamw),
        Case("llama-3.2-1b", model_shapes("llama-3.2-1b"), CLIP, dtype="bf16"),
        Case("2000 x 1k", small, (*CLIP, "fastguard flat", "fastguard flat trusted")),
        Case("gpt2-124m", gpt2, STEP, USUAL_STEP, situation="clipping", optimizer=adamw),
        Case("gpt2-124m", gpt2, STEP, USUAL_STEP, situation="one NaN, skipped", optimizer=adamw),
        Case("gpt2-124m", gpt2, CLIP, dtype="bf16"),
        Case("gpt2-124m", gpt2, CLIP, situation="clipping"),
        Case("1000 x 10k", EXTREMES["1000 x 10k"], CLIP),
    ]


def a_256th(case: Case) -> Case:
    """Returns a case with smaller tensors, under a name that matches no target."""
    shapes = [(max(1, n // 256), *rest) for n, *rest in case.shapes]
    return replace(case, name=f"{case.name} / 256", shapes=shapes)


def measure_all(
    result: Result,
    device: torch.device,
    chosen: list[Case],
    write: Callable[[], None],
    *,
    seconds: float,
    case_seconds: float,
) -> None:
    """Runs the cases, and adds rows, or the reasons for missing rows, to the result."""
    start = time.perf_counter()
    limit = Ceilings(**result["ceilings"])
    try:
        result["syncs"] = count_syncs(device)
    except Exception as error:
        _failed(result, "syncs", error)
    for case in chosen:
        write()
        if time.perf_counter() - start > seconds:
            result["left_out"] |= {f"{case.id}: {c}": "no time was left" for c in case.contenders}
            continue
        try:
            rows, missing = run_case(case, device, limit, seconds=case_seconds)
        except Exception as error:  # the error is reported, and the other cases still run
            _failed(result, case.id, error)
            continue
        result["rows"] += [row.as_dict() for row in rows]
        result["left_out"] |= {f"{case.id}: {name}": reason for name, reason in missing.items()}
        result["seconds"] = time.perf_counter() - start
        print(f"{result['seconds']:4.0f} s  {case.id}", flush=True)


def _failed(result: Result, what: str, error: Exception) -> None:
    result["failures"][what] = f"{type(error).__name__}: {error}"
    traceback.print_exc()


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = options("gpu", __doc__, quick="small sizes and few rounds", seconds=SECONDS)
    if args is None:
        return 2
    device = args.device
    chosen = [a_256th(case) for case in cases()] if args.quick else cases()
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    limit = ceilings(device)
    print(limit, flush=True)
    result = new_result(command, device, limit, []) | {"failures": {}}
    result["commit"] = commit()

    def write() -> None:
        result["targets"] = judge(result)
        if args.out:
            save(result, args.out)

    with incidents_unlogged():
        case_seconds = 0.2 if args.quick else CASE_SECONDS
        measure_all(result, device, chosen, write, seconds=args.seconds, case_seconds=case_seconds)
    write()
    console = wide_console()
    console.print(row_table(result))
    console.print(target_table(result, unmeasured=False))
    return 1 if result["failures"] or result["syncs"] else 0


if __name__ == "__main__":
    sys.exit(main())
