"""Runs incidents through the command line, and returns the outcomes of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import Incident, Outcome
from fastguard.records.read_json_lines import read_records


def play(letter: str, folder: Path) -> tuple[Outcome, Outcome]:
    """Runs `fastguard demo --incident LETTER`, which must exit with 0.

    Args:
        letter: Letter of the incident.
        folder: Output folder.

    Returns:
        Outcomes of the unguarded and of the guarded run.
    """
    outcomes = []

    def run(self: Incident, folder: Path, guarded: bool) -> Outcome:
        outcomes.append(self.load().run(folder, guarded))
        return outcomes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Incident, "run", run)
        assert main(["demo", "--incident", letter, "--out", str(folder)]) == 0
    as_it_was, guarded = outcomes
    return as_it_was, guarded


def assert_shown(folder: Path) -> None:
    """Checks that the demo has written the picture and the report page."""
    assert (folder / "incident.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "<html" in (folder / "records.html").read_text("utf-8")


def assert_recorded(folder: Path, guarded: Outcome) -> None:
    """Checks that the records file of the demo contains the records of the guarded run."""
    records = list(read_records(folder / "records.jsonl", strict=True))
    assert [repr(r) for r in records] == [repr(r) for r in guarded.records]


# Fixtures for a test module with one incident, whose letter is the module's LETTER.


@pytest.fixture(scope="module")
def played(request, tmp_path_factory) -> tuple[Path, Outcome, Outcome]:
    """Runs `fastguard demo --incident LETTER --out out`; returns `out` and both outcomes."""
    place = tmp_path_factory.mktemp("incident")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcomes = play(request.module.LETTER, Path("out"))  # relative, as on the pages
    return place / "out", *outcomes


@pytest.fixture
def folder(played) -> Path:
    return played[0]


@pytest.fixture
def as_it_was(played) -> Outcome:
    return played[1]


@pytest.fixture
def guarded(played) -> Outcome:
    return played[2]
