"""The pages on incidents: their code and commands run from top to bottom in one folder."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import fastguard
from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import INCIDENTS
from fastguard.commands.demo.training import one_thread
from guardtest import require

PAGES = Path(__file__).resolve().parents[4] / "docs" / "incidents"
PLAYED = "fastguard demo "  # not run here, because the tests of each incident run it
FOLLOWED = ("b", "d")  # other pages have no other commands; tests/test_docs.py runs their code

for package in ("rich", "matplotlib"):
    require(package)


def commands(block: str) -> list[tuple[list[str], int]]:
    """The arguments of each line, and the exit status in its comment."""
    found = []
    for line in block.splitlines():
        if line and not line.startswith(PLAYED):
            program, *arguments = shlex.split(line, comments=True)
            assert program == "fastguard"
            status = re.search(r"# exit status (\d)", line)
            found.append((arguments, int(status[1]) if status else 0))
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_code_and_commands_of_a_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "train", None)  # removes the page's module afterward
    del sys.modules["train"]
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


TABLE = (PAGES / "README.md").read_text()
METHODS = {"step", "add_sink"}
CALLED = set(re.findall(r"`(?:fastguard\.|opt\.|\w+=)?([A-Za-z]\w+_?)\(", TABLE)) - METHODS
NAMED = set(re.findall(r"`((?:[A-Z][a-z]+){2,})`", TABLE))


def test_the_table_names_public_functions():
    assert len(CALLED | NAMED) >= 14
    assert [name for name in CALLED | NAMED if not hasattr(fastguard, name)] == []
    assert all(hasattr(fastguard.GuardedOptimizer, name) for name in METHODS)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_table_links_a_page_for_every_incident():
    for story in INCIDENTS:
        assert f"]({story.letter.lower()}.md)" in TABLE
        assert (
            f"# {story.letter}. {story.title}\n"
            in (PAGES / f"{story.letter.lower()}.md").read_text()
        )
