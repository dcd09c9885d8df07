"""The code for a GPU, generated without a GPU, has few launches and no synchronization."""

import json
import os
import subprocess
import sys
from pathlib import Path

from guardtest.versions import needs_torch

ROOT = Path(__file__).parents[3]


def counts_of(*optimizers):
    """Returns counts for four matrices, from a process in which torch assumes a GPU."""
    path = os.pathsep.join(map(str, (ROOT / "tests" / "support", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "guardtest.cuda_code", "4", *optimizers],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(optimizers, lines, strict=True))


@needs_torch(2, 12, "the code of an older inductor is arranged in another way")
def test_few_launches_no_large_buffer_and_no_synchronization():
    codes = counts_of("AdamW", "AdamW/unmasked", "SGD")
    for name, counts in codes.items():
        assert counts["launches"] <= 2, name  # step counts and weights
        assert counts["large allocations"] == 0, name
        assert counts["waits"] == 0, name
    masked, bare = codes["AdamW"], codes["AdamW/unmasked"]
    assert masked["stores"] == bare["stores"]
    assert masked["loads"] - bare["loads"] == 4 * 2  # the loads of found_inf
