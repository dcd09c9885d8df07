"""Prints a result on the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from fastguard.commands.bench.machine import title_of
from fastguard.commands.bench.results import Result
from fastguard.commands.bench.runner import OURS


def rich_parts() -> tuple[Any, Any]:
    """`rich.box` and `rich.table`, or an error that names the extra."""
    try:
        from rich import box, table
    except ImportError:
        raise ImportError(
            "the tables of the benchmarks need rich: pip install 'torch-fastguard[cli]'"
        ) from None
    return box, table


def row_table(result: Result) -> Any:
    """A table of contenders per case: ratio, percent of the limit, error of the norm."""
    box, table = rich_parts()
    ceilings = result["ceilings"]
    t = table.Table(
        title=f"Guarding a step on {title_of(result['machine'])}, {result['date'][:10]}",
        caption=f"ratio: time of the baseline (=) divided by the contender's, in the same round. "
        f"limit: read {ceilings['read_gb_s']:.0f} GB/s, update {ceilings['update_gb_s']:.0f} GB/s; "
        "above 100 %, the data came from a cache",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    t.add_column("case", min_width=30, max_width=44)
    t.add_column("contender", no_wrap=True)
    for name in ("ms", "ratio p50 \\[p20..p80]", "% of limit", "norm error"):
        t.add_column(name, justify="right", no_wrap=True)
    rows = [row for row in result["rows"] if not row["series"]]
    for case, members in groupby(rows, key=lambda row: row["case"]):
        members = list(members)
        cells = [_cells(row) for row in members]
        about = f"[dim]{members[0]['tensors']} tensors; I/O: {members[0]['io']}[/dim]"
        columns = zip(*cells, strict=True)
        # One table row per case, so that the description of a case may take several lines.
        t.add_row(f"{case}\n{about}", *("\n".join(column) for column in columns))
        t.add_section()
    return t


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    r = row["ratio"]
    error = row["norm_error"]
    return (
        _contender(row),
        milliseconds(row["ms"]["p50"]),
        rf"{r['p50']:.2f} \[{r['p20']:.2f}..{r['p80']:.2f}]",
        f"{row['limit_percent']:.0f}",
        "-" if error is None else f"{float(error):.1e}",
    )


def milliseconds(value: float) -> str:
    """Formats three significant digits, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _contender(row: dict[str, Any]) -> str:
    name = row["contender"]
    if name == row["baseline"]:
        return f"{name} ="
    return f"[bold]{name}[/bold]" if name.startswith(OURS) else name
