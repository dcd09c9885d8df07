"""The loop of docs/config.md works without any section of the file."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


@pytest.mark.parametrize("section", ["checkpoints", "activations", "batch", "rollback", "schedule"])
def test_the_loop_in_the_docs_works_without_any_one_section(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    whole = rf"^\[{section}\b.*?(?=^\[(?!{section}\b)|^\"\"\")"
    block, found = re.subn(whole, "", block, flags=re.S | re.M)
    assert found and f"[{section}" not in block
    Path("block.py").write_text(block.partition("\nassert ")[0])
    assert runpy.run_path("block.py")["opt"].applied_steps == 20
