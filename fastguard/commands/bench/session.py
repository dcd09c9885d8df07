"""Runs a list of benchmark cases, shows their progress, and returns one result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastguard.commands.bench.machine import ceilings
from fastguard.commands.bench.results import Result, new_result
from fastguard.commands.bench.runner import Row, run_case
from fastguard.commands.bench.workload import Case
from fastguard.commands.terminal import incidents_unlogged


def measure_cases(
    cases: Sequence[Case],
    device: torch.device,
    *,
    command: str,
    seconds: float,
    console: Any = None,
) -> Result:
    """Measures the memory bandwidth of the device, then every case.

    Args:
        cases: The cases.
        device: The device.
        command: Command that reproduces the result; printed under tables and charts.
        seconds: Approximate duration per case.
        console: A `rich.console.Console` for progress. None: silent.
    """
    start = time.perf_counter()
    limit = ceilings(device)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    with incidents_unlogged(), _progress(console, len(cases)) as advance:
        for case in cases:
            advance(case.id)
            found, missing = run_case(case, device, limit, seconds=seconds)
            rows += found
            left_out |= {f"{case.id}: {name}": reason for name, reason in missing.items()}
    result = new_result(command, device, limit, rows)
    result["left_out"] = left_out
    result["seconds"] = time.perf_counter() - start
    return result


@contextmanager
def _progress(console: Any, total: int) -> Iterator[Any]:
    if console is None:
        yield lambda label: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TimeElapsedColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring memory bandwidth", total=total)
        started = False

        def advance(label: str) -> None:
            nonlocal started
            progress.update(task, advance=int(started), description=label)
            started = True

        yield advance
