"""The Python blocks of the pages in docs/ run unchanged, each in an empty folder."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from fastguard.commands.demo.training import one_thread
from guardtest.gloo_groups import end_groups

DOCS = Path(__file__).resolve().parents[1] / "docs"
# The frameworks of these pages are in the environment of tests/integrations.
ELSEWHERE = ("huggingface", "incidents/a", "lightning", "loggers", "ultralytics")
PAGES = {page.relative_to(DOCS).with_suffix("").as_posix(): page for page in DOCS.rglob("*.md")}
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, page in sorted(PAGES.items())
    if name not in ELSEWHERE
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.distributed.destroy_process_group", end_groups)
    script = tmp_path / "block.py"
    script.write_text(block)
    with one_thread():
        runpy.run_path(str(script), run_name="__main__")
