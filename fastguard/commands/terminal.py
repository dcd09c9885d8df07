"""Prints escaped text and tables for the commands, with rich where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from fastguard.errors.logger import log
from fastguard.errors.plain_text import printable as printable


def say(text: str, file: TextIO | None = None) -> None:
    """Prints one line, with unprintable characters escaped."""
    print(printable(text), file=file)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, with unprintable characters in cells escaped."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*heads, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def text_of(value: object) -> str:
    """Formats a cell: `-` for None, numbers without trailing zeros."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


@contextmanager
def incidents_unlogged(*others: str) -> Iterator[None]:
    """Hides the guard's log lines about incidents, for commands that print incidents themselves.

    Args:
        others: Names of other loggers whose warnings are hidden too.
    """
    levels = {logger: logger.level for logger in (log, *map(logging.getLogger, others))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
