"""Trains a small GPT on Python's own source three times through the same faults.

Bare PyTorch, PyTorch with clip_grad_norm_, and fastguard start from the same weights and get the
same batches. The command prints the outcome of each run, and writes a picture (demo.png) and the
records of the guarded run (records.jsonl). The exit status is 1 if the guarded run did not stay
finite.

With --incident, the command replays a failed run, unguarded and guarded. It writes a picture of
both runs (incident.png), and the guarded run's records (records.jsonl) and report (records.html).
The exit status is 1 if the unguarded run survived or the guarded run did not survive.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastguard.commands.demo.faults import MIN_STEPS, Fault, plan
from fastguard.commands.demo.incidents import INCIDENTS
from fastguard.commands.demo.shards import COMMAND, Shards, processes
from fastguard.commands.demo.training import WAYS, Run, Settings, one_thread, train
from fastguard.commands.terminal import incidents_unlogged
from fastguard.commands.usage import UsageError, integer, need, output_folder

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard demo`."""
    steps = integer(MIN_STEPS, 1_000_000, why="in fewer steps, the faults would overlap")
    parser.add_argument(
        "--steps", type=steps, default=Settings().steps, help="steps of each run (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=integer(0, 2**63 - 1),
        default=0,
        help="seed of weights and batches (%(default)s)",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="fastguard-demo", help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--incident",
        choices=[incident.letter for incident in INCIDENTS],
        type=str.upper,
        help="replay a failed run instead: "
        + "; ".join(f"{incident.letter}: {incident.title}" for incident in INCIDENTS),
    )
    parser.add_argument(
        "--fsdp", action="store_true", help=f"train on several processes, sharded: {COMMAND}"
    )
    parser.add_argument(
        "--no-faults", action="store_true", help="inject no faults: all three runs should agree"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, prints the results and writes the files."""
    need("rich", "matplotlib", extra="cli")
    folder = output_folder(args.out)
    if args.incident is not None:
        if args.fsdp:
            raise UsageError("--incident runs in one process; leave out --fsdp")
        from fastguard.commands.demo.incidents.play import play

        return play(args.incident, folder)
    settings = Settings(steps=args.steps, seed=args.seed)
    faults = () if args.no_faults else plan(settings.steps)
    with processes(args.fsdp, settings.batch_size) as shards:
        return _play(settings, faults, folder, shards)


def _play(settings: Settings, faults: Sequence[Fault], folder: Path, shards: Shards) -> int:
    from rich.console import Console

    from fastguard.commands.demo.picture import draw
    from fastguard.commands.demo.report import incidents_table, runs_table, sentences, write_records

    console = Console(highlight=False, quiet=not shards.is_first)
    runs = train_all(settings, faults, console, shards)
    guarded = runs[-1]

    console.print("", runs_table(runs), "", sep="\n")
    if faults or guarded.skipped:
        console.print(incidents_table(guarded, faults), "", sep="\n")
    for sentence in sentences(runs, faults):
        console.print(sentence, end="\n\n")
    if shards.is_first:
        draw(runs, faults, settings.max_norm, folder / "demo.png")
        write_records(guarded.records, folder / "records.jsonl", "fastguard demo", guarded.settings)
    console.print(f"Written: {folder / 'demo.png'}, {folder / 'records.jsonl'}", soft_wrap=True)
    return 0 if guarded.destroyed_at is None and math.isfinite(guarded.validation) else 1


def train_all(
    settings: Settings, faults: Sequence[Fault], console: Console, shards: Shards
) -> list[Run]:
    """Trains the three runs with live progress."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastguard.commands.demo.text import load_text

    text = load_text()
    console.print(
        f"A byte-level GPT learns {len(text.training) / 1e6:.1f} MB of Python's standard library: "
        f"{settings.steps} steps, seed {settings.seed}, {len(faults)} injected faults."
    )
    progress = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress, one_thread(), incidents_unlogged():
        tasks = [
            progress.add_task(w.name, total=settings.steps, state="", start=False) for w in WAYS
        ]
        runs = []
        for way, task in zip(WAYS, tasks, strict=True):
            progress.start_task(task)

            def show(run: Run, task=task) -> None:
                progress.update(task, completed=len(run.losses), state=_state(run))

            runs.append(train(way, settings, text, faults, show, shards))
    return runs


def _state(run: Run) -> str:
    loss = run.losses[-1]
    color = "green" if math.isfinite(loss) else "red"
    skipped = f", {run.skipped} skipped" if run.records else ""
    return f"[{color}]loss {loss:.3f}{skipped}[/]"
