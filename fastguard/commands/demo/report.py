"""The demo's final output: two tables, a short text per run, and the records as JSON lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastguard.commands.demo.faults import Fault, Kind
from fastguard.commands.demo.training import Bare, Clipped, Guarded, Run
from fastguard.errors import describe_culprits
from fastguard.records.json_lines_sink import JsonLinesSink
from fastguard.records.step_record import StepRecord

if TYPE_CHECKING:
    from rich.table import Table


def runs_table(runs: Sequence[Run]) -> Table:
    """A table with one row per run."""
    table = _table("run", "validation loss", "applied", "skipped", "weights")
    for run in runs:
        alive = run.destroyed_at is None
        table.add_row(
            run.name,
            f"{run.validation:.3f}",
            str(run.applied),
            str(run.skipped),
            "finite" if alive else f"NaN since step {run.destroyed_at}",
            style="green" if alive else "red",
        )
    return table


def incidents_table(guarded: Run, faults: Sequence[Fault]) -> Table:
    """A table with one row per fault and per step that fastguard did not simply apply."""
    table = _table("step", "injected", "action", "reason", "where")
    injected = {fault.step: fault for fault in faults}
    recorded = {record.step: record for record in guarded.records if record.is_incident}
    for step in sorted({*injected, *recorded}):
        fault, record = injected.get(step), recorded.get(step)
        if fault and fault.in_burst and not injected.get(step - 1):
            table.add_section()
        table.add_row(
            str(step),
            fault.kind.value if fault else "-",
            *((record.action, record.reason, where(record)) if record else ("-", "-", "-")),
        )
    return table


def where(record: StepRecord) -> str:
    """The location of an incident: the parameter, the loss, or the norm and its threshold."""
    places = [f"{name} {v}" for name, v in record.losses.items() if not math.isfinite(v)]
    if places and record.n_culprits:
        places.append(f"and {record.n_culprits} gradients")
    elif record.culprits:
        places.append(describe_culprits(record.culprits[:1], record.n_culprits))
    elif record.culprit_rank is not None:
        places.append(f"a shard of rank {record.culprit_rank}")
    elif record.spikes:
        places.append(f"norm {record.total_norm:.4g} > {record.thresholds['grad_norm']:.3g}")
    return ", ".join(places)


def sentences(runs: Sequence[Run], faults: Sequence[Fault]) -> list[str]:
    """Describes the outcome in one short text per run."""
    by_name = {run.name: run for run in runs}
    bare, clipped, guarded = (by_name[way.name] for way in (Bare, Clipped, Guarded))
    if not faults:
        return [_agreement(clipped, guarded)]
    spike = next(fault for fault in faults if fault.kind is Kind.SPIKE)
    before, after = _around(bare.losses, spike.step)
    return [
        f"{bare.name}: after {_step_text(spike)} the training loss went from {before:.2f} to "
        f"{after:.2f}. {_destruction(bare, faults)}",
        f"{clipped.name}: clipped the gradients of {_step_text(spike)} to norm 1. "
        f"{_destruction(clipped, faults)} Clipping cannot help: one Inf makes the norm Inf and the "
        "coefficient 0, and 0 × Inf is NaN.",
        f"{guarded.name}: skipped {guarded.skipped} of {len(guarded.losses)} steps, "
        f"{_precision(guarded, faults)}. Weights and optimizer state are as if those steps had "
        "never been taken.",
    ]


def write_records(
    records: Iterable[StepRecord], path: Path, name: str, settings: str | None = None
) -> None:
    """Writes records as a `JsonLinesSink` does, replacing an older file."""
    path.unlink(missing_ok=True)
    with JsonLinesSink(path, name=name) as sink:
        if settings is not None:
            sink.add_guard(settings, torch.device("cpu"))
        for record in records:
            sink(record)


def _agreement(clipped: Run, guarded: Run) -> str:
    pairs = enumerate(zip(clipped.losses, guarded.losses, strict=True), start=1)
    differs_at = next((step for step, (a, b) in pairs if a != b), None)
    difference = abs(clipped.validation - guarded.validation)
    until = "at every step" if differs_at is None else f"before step {differs_at}"
    return (
        f"Without faults {guarded.name} agrees with {clipped.name}: the training losses are equal "
        f"{until}, and the validation losses differ by {difference:.1g}. Only clipping can cause a "
        "difference, because torch sums the norm in float32."
    )


def _around(losses: Sequence[float], step: int) -> tuple[float, float]:
    """The mean of the five losses up to a step, and the maximum of the twenty after it."""
    before = [v for v in losses[max(0, step - 5) : step] if math.isfinite(v)]
    after = [v for v in losses[step : step + 20] if math.isfinite(v)]
    return sum(before) / max(1, len(before)), max(after, default=math.nan)


def _step_text(fault: Fault) -> str:
    return f"step {fault.step} ({fault.kind.value})"


def _destruction(run: Run, faults: Sequence[Fault]) -> str:
    cause = next((fault for fault in faults if fault.step == run.destroyed_at), None)
    if cause is None:
        return "Its weights stayed finite."
    return f"Then {_step_text(cause)} put NaN into its weights, and every later loss is NaN."


def _precision(guarded: Run, faults: Sequence[Fault]) -> str:
    skipped = {record.step for record in guarded.records if record.action == "skipped"}
    faulty = {fault.step for fault in faults}
    if skipped == faulty:
        return "exactly those with a fault"
    return f"including {len(skipped & faulty)} of the {len(faulty)} with a fault"


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    numbers = ("validation loss", "applied", "skipped", "step")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table
