"""The code that a GPU would run, made without one: launches, memory, and nothing that waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

from guardtest.versions import needs_torch

ROOT = Path(__file__).parents[3]


def counts_of(*optimizers):
    """Counts for four matrices; in a process of its own, where torch believes in a GPU."""
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
def test_few_launches_no_large_buffer_and_nothing_that_waits():
    codes = counts_of("AdamW", "AdamW/unmasked", "SGD")
    for name, counts in codes.items():
        assert counts["launches"] <= 2, name  # step counts and weights
        assert counts["large allocations"] == 0, name
        assert counts["waits"] == 0, name
    masked, bare = codes["AdamW"], codes["AdamW/unmasked"]
    assert masked["stores"] == bare["stores"]
    assert masked["loads"] - bare["loads"] == 4 * 2  # found_inf, beside the step and the weight
