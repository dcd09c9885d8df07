"""Other shapes of the read pass, against the one in use: python -m benchmarks.tune [--out FILE]

Each try says before it runs what it is expected to give. All of them take turns, round by round,
in one process, with a cold L2. The ratio is the time of the shape in use over that of the try,
within a round: above 1 is faster. What a card says becomes a row of the lab table in
`kernels/measure.py`. On a machine without a card the exit status is 2.
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
    """One change.

    Attributes:
        name: What is changed.
        expected: What it should give, and why.
        changes: Fields of `Tuning`.
        chunk: Elements a chunk, in place of balanced ones.
    """

    name: str
    expected: str
    changes: tuple[tuple[str, Any], ...] = ()
    chunk: int | None = None


TRIES = (
    Try("as it is", "1"),
    Try("as it is, once more", "1: what differs is noise"),
    Try("chunks of 65536", "0.90 to 0.97: programs idle in the last round", chunk=CHUNK),
    Try("chunks of 16384", "0.97 to 1: four times as many rows are waited for", chunk=16384),
    Try("2 programs", "below 1: 32 kB in flight a multiprocessor", (("programs", 2),)),
    Try(
        "32 kB blocks, 2 programs",
        "1: 64 kB in flight, but 128 registers",
        (("block_bytes", 32768), ("programs", 2), ("max_registers", 128)),
    ),
    Try(
        "8 kB blocks, 4 warps, 6 programs",
        "1: the same in flight; the end is finer",
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
    """The read pass in one shape, over a table of its own."""
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
    """One row a try that compiles."""
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
        except Exception:  # a shape that does not compile is an answer too
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
    """As in the docstring of a kernel."""
    lines = ["| try | dtype | expected | ratio p50 [p20..p80] | of the read ceiling | card |"]
    for row in rows:
        r = row["ratio"]
        ratio = f"{r['p50']:.3f} [{r['p20']:.3f}..{r['p80']:.3f}]"
        cells = (row["try"], row["dtype"], row["expected"], ratio, f"{row['limit_percent']:.1f} %")
        lines.append(f"| {' | '.join(cells)} | {card} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA device: on a CPU there is nothing to tune by")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backend.why_not_triton(device)
    if reason is not None:
        print(f"benchmarks.tune needs the kernels, which cannot serve {device}: {reason}")
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
