"""Reads the records of a run (JSON lines, as written by JsonLinesSink) and writes one HTML page.

The page shows a written verdict; plots of loss, gradient norm, clip coefficient, learning rate,
incidents and affected layers over a shared step axis; and a table of incidents linked to the plots.
It works offline. The verdict is also printed, as JSON with --json. The exit status is 1 if the run
ended in an incident.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguard.commands.files import atomic_write
from fastguard.commands.run_files import raise_no_records, records_file
from fastguard.commands.usage import need, output_folder
from fastguard.errors.plain_text import printable
from fastguard.records.read_json_lines import read_blocks
from fastguard.records.rotated_files import rotated_files
from fastguard.records.strict_json import dumps

if TYPE_CHECKING:
    from fastguard.commands.report.summary import Summary
    from fastguard.commands.report.verdict import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard report`."""
    parser.add_argument(
        "records", metavar="RUN", help="the file of records, or the folder that holds it"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write the page to (default: the records' folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Reads the records, writes the page and prints the verdict."""
    need("jinja2", "plotly", "rich", extra="report")
    path = records_file(args.records)
    folder = output_folder(args.out if args.out is not None else str(path.parent))

    from fastguard.commands.report.page import render
    from fastguard.commands.report.summary import summarize
    from fastguard.commands.report.verdict import judge

    with _progress(path) as progress:
        summary = summarize(read_blocks(path), progress=progress)
    if not summary.records:
        raise_no_records(path, summary.damaged)
    verdict = judge(summary)
    page = folder / f"{path.stem}.html"
    with atomic_write(page) as temporary:
        temporary.write_text(render(_name(path, summary), summary, verdict), "utf-8")
    if args.json:
        print(dumps(_as_dict(summary, verdict, page), indent=2))
    else:
        print(verdict.headline, *(f"- {finding}" for finding in verdict.findings), sep="\n")
        print(f"Written: {printable(str(page))}")
    return 0 if verdict.survived else 1


def _name(path: Path, summary: Summary) -> str:
    """The name of the run and of its file."""
    name = None if summary.header is None else summary.header.name
    return path.name if not name else f"{name} · {path.name}"


def _as_dict(summary: Summary, verdict: Verdict, page: Path) -> dict[str, Any]:
    """The verdict and its evidence as JSON values; incidents are the rows of the table."""
    return {
        "headline": verdict.headline,
        "findings": verdict.findings,
        "survived": verdict.survived,
        "page": str(page),
        "run": None if summary.header is None else asdict(summary.header),
        "starts": summary.starts,
        "first_time": None if summary.clock is None else summary.clock.start,
        "last_time": None if summary.clock is None else summary.clock.end,
        "records": summary.records,
        "damaged_lines": summary.damaged,
        "first_step": summary.first_step,
        "last_step": summary.last_step,
        "actions": dict(summary.actions),
        "n_incidents": summary.table.incidents,
        "incidents": [
            {
                "first_step": row.first_step,
                "last_step": row.last_step,
                "incidents": row.incidents,
                "steps": row.steps,
                "reasons": dict(row.reasons),
                "actions": dict(row.actions),
                "culprits": row.first.culprits,
                "n_culprits": row.first.n_culprits,
                "tag": row.first.tag,
            }
            for row in summary.table.rows
        ],
    }


@contextmanager
def _progress(path: Path) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar on a terminal, and removes it when done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    size = sum(map(_size, (*rotated_files(path), path)))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Reading {escape(printable(path.name))}", total=size)
        yield lambda read: progress.advance(task, read)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # the file was renamed or deleted after it was listed
        return 0
