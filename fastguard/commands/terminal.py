"""What commands print: text from files made harmless, and tables (rich's where it is installed)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text in one line, each control character as `?`: what a file holds commands no terminal.

    Example:
        >>> printable("loss" + chr(27) + "[2J nan" + chr(9) + "é")
        'loss?[2J nan é'
    """
    text = text.replace("\t", " ")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text under their heads."""
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
    """A cell: `-` for None, numbers without trailing zeros."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
