"""The pages on incidents, followed from top to bottom in one folder: Python and commands."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from fastguard.cli import main
from fastguard.demo.training import one_thread
from guardtest import require

PAGES = Path(__file__).resolve().parents[2] / "docs" / "incidents"
PLAYED = "fastguard demo "  # each incident's own test plays it
FOLLOWED = ("b",)  # the other pages have no commands beside; tests/test_docs.py runs their code

for package in ("rich", "matplotlib"):
    require(package)


def commands(block: str) -> list[tuple[list[str], int]]:
    """The arguments of each line, and the exit status that its comment tells."""
    found = []
    for line in block.splitlines():
        if line and not line.startswith(PLAYED):
            program, *arguments = shlex.split(line, comments=True)
            assert program == "fastguard"
            told = re.search(r"# exit status (\d)", line)
            found.append((arguments, int(told[1]) if told else 0))
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_reader_can_follow_the_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = (PAGES / f"{name}.md").read_text()
    ran = 0
    for kind, block in re.findall(r"^```(python|sh)\n(.*?)^```", page, re.S | re.M):
        if kind == "python":
            Path("train.py").write_text(block)
            with one_thread():
                runpy.run_path("train.py", run_name="__main__")
            continue
        for arguments, status in commands(block):
            assert main(arguments) == status, arguments
            ran += 1
    assert ran > 0
