"""Prints a diagnosis on the terminal."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from fastguard.diagnosis.finding import Finding
from fastguard.diagnosis.report import Diagnosis

if TYPE_CHECKING:
    from rich.table import Table

_COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def show(diagnosis: Diagnosis) -> None:
    """Prints a diagnosis: a table on a terminal with rich, otherwise plain lines."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console().print(table(diagnosis), diagnosis.verdict, sep="\n", highlight=False)
    else:
        print(diagnosis)


def table(diagnosis: Diagnosis) -> Table:
    """A `rich.table.Table` with one row per finding. Requires the extra `cli`."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, show_lines=True)
    found.add_column("check", no_wrap=True)
    found.add_column("finding and remedy", ratio=1)
    found.add_column("value", justify="right", no_wrap=True)
    for finding in diagnosis:
        color = _COLORS[finding.severity]
        head = finding.kind if finding.severity != "ok" else ""
        where = f" [dim]{escape(finding.where)}[/]" if finding.where else ""
        lines = [f"[{color}]{head}[/]{where}"] if head else []
        lines.append(escape(finding.seen))
        lines += [f"[italic]→ {escape(finding.remedy)}[/]"] if finding.remedy else []
        found.add_row(
            f"{escape(finding.check)}\n[{color}]{finding.severity}[/]",
            "\n".join(lines),
            value_and_limit(finding),
        )
    return found


def value_and_limit(finding: Finding) -> str:
    """The measured value and its limit, on two lines."""
    if finding.limit is None or finding.severity == "ok":
        return ""
    return f"{finding.value:.3g}\nlimit {finding.limit:.3g}"
