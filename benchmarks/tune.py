"""Other launch parameters of the read pass: python -m benchmarks.tune [--out FILE]

Each trial states the expected result in advance. All trials alternate in every round, in one
process, with a cold L2. The ratio is the time of the current parameters divided by the time of the
trial in the same round: above 1 is faster. The results on a card become rows of the lab table in
`kernels/measure.py`. On a machine without a card, the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.script import commit
from fastguard.commands.bench.clock import Clock, Sample
from fastguard.commands.bench.machine import Evictor, ceilings, describe_machine, versions
from fastguard.commands.bench.results import write
from fastguard.commands.bench.runner import Spread
from fastguard.gradients.buckets import bucketize
from fastguard.stages import backend

ROUNDS = 31
MEGABYTES = 512
CHUNK = 65536


@dataclass(frozen=True)
class Try:
    """A trial.

    Attributes:
        name: The change.
        expected: The expected ratio, and the reason.
        changes: Changed fields of `Tuning`.
        chunk: Elements per chunk; None: balanced chunks.
    """

    name: str
    expected: str
    changes: tuple[tuple[str, Any], ...] = ()
    chunk: int | None = None


TRIES = (
    Try("unchanged", "1"),
    Try("unchanged, again", "1: any difference is noise"),
    Try("chunks of 65536", "0.90 to 0.97: programs idle in the last round", chunk=CHUNK),
    Try("chunks of 16384", "0.97 to 1: waits for four times as many rows", chunk=16384),
    Try("2 programs", "below 1: 32 kB in flight per multiprocessor", (("programs", 2),)),
    Try(
        "32 kB blocks, 2 programs",
        "1: 64 kB in flight, but 128 registers",
        (("block_bytes", 32768), ("programs", 2), ("max_registers", 128)),
    ),
    Try(
        "8 kB blocks, 4 warps, 6 programs",
        "1: the same in flight; a shorter last round",
        (("block_bytes", 8192), ("num_warps", 4), ("programs", 6)),
    ),
    Try(
        "8 kB blocks, 6 programs of 40 registers",
        "below 1: it spills",
        (("block_bytes", 8192), ("programs", 6), ("max_registers", 40)),
    ),
    Try("evict_first", "1: nothing is read twice here", (("eviction", "evict_first"),)),
)


def reader(grads: list[torch.Tensor], one: Try, device: torch.device) -> Callable[[], object]:
    """Returns the read pass of a trial, with its own table."""
    from fastguard.kernels import chunk_layout, chunks
    from fastguard.kernels.measure import measure_chunks
    from fastguard.kernels.tuning import PLAIN, n_programs

    tuning = replace(PLAIN, **dict(one.changes))
    bucket = bucketize(grads).buckets[0]
    size = chunk_layout.chunk_size if one.chunk is None else lambda *_: one.chunk
    with (
        mock.patch.object(chunk_layout, "chunk_size", size),
        mock.patch.dict(chunks._tables, clear=True),
        mock.patch.dict(chunks._layouts, clear=True),
    ):
        table = chunks.table_of(bucket, 1, n_programs(device, tuning))
    dtype, n = bucket.dtype, len(grads)
    return lambda: measure_chunks(table, device, dtype, 1, n, 2.0, None, False, tuning)


def measured(device: torch.device, dtype: torch.dtype, read_gb_s: float) -> list[dict[str, Any]]:
    """Measures one row per trial that compiles."""
    n = MEGABYTES * 2**20 // dtype.itemsize // 8
    grads = [torch.randn(n, device=device).to(dtype) for _ in range(8)]
    n_bytes = sum(g.nbytes for g in grads)
    calls: dict[Try, Callable[[], object]] = {}
    for one in TRIES:
        try:
            calls[one] = reader(grads, one, device)
            for _ in range(3):
                calls[one]()
            torch.cuda.synchronize(device)
        except Exception:  # parameters that do not compile are reported too
            traceback.print_exc()
            calls.pop(one, None)
    clock, evict = Clock(device), Evictor(device)
    samples: dict[Try, list[Sample]] = {one: [] for one in calls}
    for _ in range(ROUNDS):
        for one, call in calls.items():
            samples[one].append(clock.sample(call, evict))
    base = [s.device_ms for s in samples[TRIES[0]]]
    rows = []
    for one, found in samples.items():
        ms = [s.device_ms for s in found]
        ratio = Spread.of([b / m for b, m in zip(base, ms, strict=True)])
        percent = 100.0 * n_bytes / Spread.of(ms).p50 / 1e6 / read_gb_s
        rows.append(
            {"try": one.name, "dtype": str(dtype).removeprefix("torch."), "expected": one.expected}
            | {"ratio": asdict(ratio), "device_ms": asdict(Spread.of(ms)), "limit_percent": percent}
        )
    return rows


def lab_rows(rows: list[dict[str, Any]], card: str) -> list[str]:
    """Returns rows of a table for the docstring of a kernel."""
    lines = ["| try | dtype | expected | ratio p50 [p20..p80] | of the read ceiling | card |"]
    for row in rows:
        r = row["ratio"]
        ratio = f"{r['p50']:.3f} [{r['p20']:.3f}..{r['p80']:.3f}]"
        cells = (row["try"], row["dtype"], row["expected"], ratio, f"{row['limit_percent']:.1f} %")
        lines.append(f"| {' | '.join(cells)} | {card} |")
    return lines


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA device")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backend.why_not_triton(device)
    if reason is not None:
        print(f"benchmarks.tune needs the kernels, which are not available on {device}: {reason}")
        return 2
    limit, machine = ceilings(device), describe_machine(device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measured(device, dtype, limit.read_gb_s)
    print("\n".join(lab_rows(rows, str(machine["card"]))))
    if args.out:
        document = {"machine": machine, "versions": versions(), "ceilings": asdict(limit)}
        write(document | {"commit": commit(), "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
