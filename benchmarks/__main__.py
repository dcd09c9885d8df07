"""`make bench`: measures everything, prints it, and updates the results and their charts.

python -m benchmarks                      # the whole suite: about five minutes on two cores
python -m benchmarks --quick              # about a minute, only printed; same as `fastguard bench`
python -m benchmarks --device cuda        # on a GPU
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# torch reads this variable, which silences its profiler
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from benchmarks.accuracy import accuracy_cases, measure_accuracy
from benchmarks.growth import SECONDS as POINT_SECONDS
from benchmarks.growth import fits, growth_cases, growth_table
from benchmarks.memory import measure_memory, memory_cases
from benchmarks.plots import draw
from benchmarks.suite import CPU_SECONDS, CUDA_SECONDS, cases
from benchmarks.syncs import count_syncs
from benchmarks.targets import judge, target_table
from fastguard.commands.bench.command import device_of, wide_console
from fastguard.commands.bench.machine import slug_of
from fastguard.commands.bench.results import save
from fastguard.commands.bench.selection import SECONDS, selection
from fastguard.commands.bench.session import measure_cases
from fastguard.commands.bench.table import row_table
from fastguard.commands.usage import UsageError, output_folder

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cpu)", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a selection of about a minute; writes no files"
    )
    parser.add_argument("--out", metavar="DIR", help=f"output folder (default: {RESULTS.name})")
    args = parser.parse_args()
    try:
        device = device_of(args.device)
        folder = output_folder(args.out) if args.out else None if args.quick else RESULTS
    except UsageError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2

    console = wide_console()
    start = time.perf_counter()
    command = "python -m benchmarks"
    command += "" if device.type == "cpu" else f" --device {args.device}"
    if args.quick:
        result = measure_cases(
            selection(device),
            device,
            command=f"{command} --quick",
            seconds=SECONDS,
            console=console,
        )
    else:
        result = whole(device, command, console)
    result["targets"] = judge(result)
    result["seconds"] = time.perf_counter() - start

    console.print(row_table(result))
    if result["fits"]:
        console.print(growth_table(result))
    console.print(target_table(result))
    console.print(f"{result['seconds']:.0f} s")
    if folder:
        path = folder / f"{slug_of(result['machine'])}{'-quick' if args.quick else ''}.json"
        save(result, path)
        for written in [path, *draw(path, folder)]:
            console.print(f"written: {written}")
    return 0


def whole(device: torch.device, command: str, console):
    """Measures cases, growth, memory, accuracy and syncs."""
    seconds = CPU_SECONDS if device.type == "cpu" else CUDA_SECONDS
    result = measure_cases(cases(device), device, command=command, seconds=seconds, console=console)
    growth = measure_cases(
        growth_cases(device), device, command=command, seconds=POINT_SECONDS, console=console
    )
    result["rows"] += growth["rows"]
    result["left_out"] |= growth["left_out"]
    result["fits"] = fits(result)
    result["memory"] = [row for case in memory_cases() for row in measure_memory(case, device)]
    result["accuracy"] = [
        row for case in accuracy_cases() for row in measure_accuracy(case, device)
    ]
    result["syncs"] = count_syncs(device)
    return result


if __name__ == "__main__":
    sys.exit(main())
