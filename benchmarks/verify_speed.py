"""`fastguard ckpt verify` against `sha256sum` on the same file, both from the page cache.

    python -m benchmarks.verify_speed [MEGABYTES]

Both commands alternate, since machines are shared; the result is the ratio of each pair. `store`
verifies a checkpoint of a store (SHA-256, every tensor), and `foreign` a file of another program
(CRC-32, every tensor).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastguard.checkpoints import inspect

PAIRS = 9


def seconds(work: Callable[[], object]) -> float:
    """Returns the time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(megabytes: int = 512) -> None:
    """Measures files of this size for each dtype."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {megabytes} MB per file"
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            n = megabytes * 2**20 // (8 * dtype.itemsize)
            torch.save({"model": [torch.randn(n).to(dtype) for _ in range(8)]}, path)
            peer = ["sha256sum", str(path)]
            pairs = []
            for _ in range(PAIRS):
                sha = seconds(lambda peer=peer: subprocess.run(peer, stdout=subprocess.DEVNULL))
                store = seconds(lambda: inspect(path, sha256=True, crc32=False))
                foreign = seconds(lambda: inspect(path))
                pairs.append((sha, sha / store, sha / foreign))
            sha, store, foreign = (statistics.median(column) for column in zip(*pairs, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(
                f"{name:9} sha256sum {megabytes / sha:5.0f} MB/s; of its speed: "
                f"store {store:.2f}, foreign {foreign:.2f}"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
