"""Incidents played as a user plays them, and what the runs themselves returned."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastguard.commands.cli import main
from fastguard.commands.demo.incidents import Incident, Outcome
from fastguard.records.read_json_lines import read_records


def play(letter: str, folder: Path) -> tuple[Outcome, Outcome]:
    """`fastguard demo --incident LETTER`, which must end well.

    Args:
        letter: Of the incident.
        folder: What is written goes there.

    Returns:
        The run as it was, and the guarded one.
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
    """The picture and the page that the demo leaves."""
    assert (folder / "incident.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "<html" in (folder / "records.html").read_text("utf-8")


def assert_recorded(folder: Path, guarded: Outcome) -> None:
    """The records that the demo leaves are those of the guarded run."""
    records = list(read_records(folder / "records.jsonl", strict=True))
    assert [repr(r) for r in records] == [repr(r) for r in guarded.records]


# Fixtures of the tests of one incident, whose module says which: LETTER.


@pytest.fixture(scope="module")
def played(request, tmp_path_factory) -> tuple[Path, Outcome, Outcome]:
    """`fastguard demo --incident LETTER --out out`, in an empty folder: `out` and the outcomes."""
    place = tmp_path_factory.mktemp("incident")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcomes = play(request.module.LETTER, Path("out"))  # relative, as the pages have it
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
