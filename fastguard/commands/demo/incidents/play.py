"""Runs an incident for `fastguard demo --incident`: both runs, records, picture, report."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path

from fastguard.commands.demo.incidents import incident
from fastguard.commands.demo.incidents.picture import draw
from fastguard.commands.demo.report import write_records
from fastguard.commands.usage import need

RUNS = {"as-it-was": False, "guarded": True}


def play(letter: str, folder: Path) -> int:
    """Runs an incident unguarded and guarded; writes the records, the picture and the report.

    Args:
        letter: Letter of the incident.
        folder: Output folder; the runs use subfolders, which are replaced.

    Returns:
        The exit status: 0 if the original run failed and the guarded run did not fail.

    Raises:
        UsageError: A package is missing; the message names the extra to install.
    """
    story = incident(letter)
    story.load()
    need("rich", "matplotlib", extra="cli")
    if story.package is not None:
        need(story.package, extra=story.extra)

    print(f"{story.letter}. {story.title}")
    outcomes = []
    for name, guarded in RUNS.items():
        own = (folder / name).resolve()  # Ultralytics resolves relative paths elsewhere
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        outcomes.append(story.run(own, guarded))
        print(f"{name.replace('-', ' ')}: {outcomes[-1].ended}")
    before, after = outcomes
    for record in after.records:
        if record.is_incident:
            print(f"  {record}")

    records, picture = folder / "records.jsonl", folder / "incident.png"
    write_records(after.records, records, f"incident {letter}")
    draw(story, before, after, picture)
    print(f"Written: {records}, {picture}")
    _report(records)
    return 0 if after.survived and not before.survived else 1


def _report(records: Path) -> None:
    if importlib.util.find_spec("plotly") is None:
        print("For the report: pip install 'torch-fastguard[report]'")
        return
    from fastguard.commands.report import command

    command.run(argparse.Namespace(records=str(records), out=None, json=False))
