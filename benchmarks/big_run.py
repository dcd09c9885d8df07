"""`fastguard report` on a run of a million steps: its time and peak memory.

    python -m benchmarks.big_run [--steps N] [--incidents N] [--keep DIR]

The file is what a `JsonLinesSink` would write, rotated at 1 GiB. Serializing a million records
would take a minute, so each line is the line of a real record with replaced numbers. The report
runs in a separate process; its peak memory is the maximum resident set size from the kernel.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastguard import StepRecord
from fastguard.records.strict_json import dumps

FILE_BYTES = 1 << 30
BLOCK = 20_000
LAYERS = [f"blocks.{i}.{part}.weight" for i in range(24) for part in ("attn", "mlp.up", "mlp.down")]


def lines(steps: int, incidents: int, seed: int = 0) -> Iterator[list[str]]:
    """Yields the lines of a run that learns, in blocks.

    Bad steps are evenly spaced, and the last step is good.
    """
    random = np.random.default_rng(seed)
    template = dumps(
        StepRecord(-1, -2.0, -3.0, "ACTION", losses={"loss": -4.0}, lr=-5.0).as_dict()
        | {"thresholds": {"grad_norm": -6.0}}
    ).replace("%", "%%")
    for place, slot in (
        ("-1,", "%d,"), ("-2.0", "%r"), ("-3.0", "%r"), ("ACTION", "%s"), ("-4.0", "%r"),
        ("-6.0", "%r"), ("-5.0", "%r"),
    ):  # fmt: skip
        template = template.replace(place, slot, 1)
    bad = set(np.linspace(0, steps, incidents + 1, endpoint=False)[1:].astype(int).tolist())
    for first in range(1, steps + 1, BLOCK):
        step = np.arange(first, min(first + BLOCK, steps + 1))
        share = step / steps
        norm = np.exp(random.normal(-0.5, 0.3, len(step)))
        coef = np.minimum(1.0, 1.0 / (norm + 1e-6))
        loss = 2.0 + 3.0 * np.exp(-8 * share) + random.normal(0, 0.05, len(step))
        lr = 3e-4 * np.minimum(1, share / 0.01) * (0.5 + 0.5 * np.cos(np.pi * share))
        threshold = 2.0 + 0.01 * random.normal(size=len(step))
        action = np.where(coef < 1, "clipped", "applied")
        # The fields are in the order of a record.
        columns = [c.tolist() for c in (step, norm, coef, action, loss, threshold, lr)]
        yield [
            bad_line(row) if row[0] in bad else template % row for row in zip(*columns, strict=True)
        ]


def bad_line(row: tuple) -> str:
    """Returns the line of a skipped step with NaN in the loss and in three gradients."""
    step, norm, coef, _, _, threshold, lr = row
    culprits = tuple((LAYERS[(step + i) % len(LAYERS)], 1 + step % 9, 0, 0) for i in range(3))
    record = StepRecord(
        step,
        norm,
        coef,
        "skipped",
        reason="nonfinite_grad",
        nan=3 * (1 + step % 9),
        culprits=culprits,
        n_culprits=3,
        losses={"loss": math.nan},
        thresholds={"grad_norm": threshold},
        consecutive_skips=1,
        lr=lr,
        tag=[step // 5000, step % 5000],
    )
    return dumps(record.as_dict())


def write_run(path: Path, steps: int, incidents: int, *, file_bytes: int = FILE_BYTES) -> int:
    """Writes a run with the rotation of a `JsonLinesSink`; returns its size in bytes."""
    full, size, total = 0, 0, 0
    file = path.open("w", encoding="utf-8")
    for block in lines(steps, incidents):
        text = "\n".join(block) + "\n"
        if size and size + len(text) > file_bytes:
            file.close()
            full += 1
            path.rename(path.with_name(f"{path.stem}.{full}{path.suffix}"))
            file, size = path.open("w", encoding="utf-8"), 0
        file.write(text)
        size += len(text)
        total += len(text)
    file.close()
    return total


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--incidents", type=int, default=1000)
    parser.add_argument("--keep", metavar="DIR", help="write the run to this folder and keep it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        size = write_run(folder / "records.jsonl", args.steps, args.incidents)
        print(f"{args.steps:,} steps, {args.incidents:,} incidents, {size / 1e9:.2f} GB")
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastguard", "report", str(folder)], check=True)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        page = (folder / "records.html").stat().st_size
        print(f"report: {seconds:.1f} s, at most {memory:.0f} MiB, page {page / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
