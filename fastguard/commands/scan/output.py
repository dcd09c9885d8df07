"""What `fastguard scan` prints, as text and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.scanner import LogScan, Stretch
from fastguard.commands.terminal import print_table, printable

ROWS = 50
"""Stretches in a table; the JSON has all that are kept."""


def as_dict(log: str, found: LogScan) -> dict[str, Any]:
    """Everything that was found, as JSON values."""
    return {
        "file": log,
        "lines": found.n_lines,
        "bad_lines": found.n_bad,
        "n_stretches": found.n_stretches,
        "stretches": [_stretch_as_dict(stretch) for stretch in found.stretches],
        "mentions": found.n_mentions,
        "first_mention": None if found.mention is None else found.mention._asdict(),
        "problem": found.problem,
    }


def print_text(log: str, found: LogScan) -> None:
    """A sentence, and a table of the stretches if there are any."""
    name = printable(log)
    lines = f"{found.n_lines:,} line{'s' * (found.n_lines != 1)}"
    if found.n_bad:
        first = found.stretches[0]
        where = _in_words(first.first)
        print(
            f"{name}: NaN or Inf in {found.n_bad:,} of {lines}, first in line {first.first_line:,}"
            f"{where}"
        )
        rows = [_row(stretch) for stretch in found.stretches[:ROWS]]
        print_table(["line", "epoch", "batch", "step", "lines", "values", "written by"], rows)
        if found.n_stretches > ROWS:
            print(f"... and {found.n_stretches - ROWS:,} more (--json has up to 1,000)")
    else:
        print(f"{name}: no NaN or Inf in {lines}")
    if found.mention is not None:
        print(
            f"note: {found.n_mentions:,} line{'s' * (found.n_mentions != 1)} with the word NaN or "
            f"Inf, but without a value; line {found.mention.number:,}: "
            f"{printable(found.mention.text)}"
        )
    if found.problem is not None:
        print(f"note: read up to there only: {found.problem}")


def print_problem(log: str, found: LogScan) -> None:
    """Why a log that shows no NaN or Inf cannot be said to have none; on standard error."""
    told = f"fastguard scan: {printable(log)}: {found.problem}"
    if found.n_lines:
        told += f"; no NaN or Inf in the {found.n_lines:,} lines before"
    print(told, file=sys.stderr)


def _row(stretch: Stretch) -> list[str]:
    first, last = stretch.first, stretch.last
    return [
        _range(stretch.first_line, stretch.last_line),
        _range(first.epoch, last.epoch, first.epochs),
        _range(first.batch, last.batch, last.batches),
        _range(first.step, last.step),
        f"{stretch.n_lines:,}",
        ", ".join(printable(f"{name} {text}".strip()) for name, text in stretch.values),
        stretch.dialect,
    ]


def _range(first: float | None, last: float | None, total: int | None = None) -> str:
    if first is None:
        first = last
    if first is None or last is None:
        return "-"
    text = f"{first}" if first == last else f"{first}-{last}"
    return text if total is None else f"{text}/{total}"


def _in_words(place: Place) -> str:
    parts = [
        f"{name} {value}" + (f" of {total}" if total is not None else "")
        for name, value, total in (
            ("epoch", place.epoch, place.epochs),
            ("batch", place.batch, place.batches),
            ("step", place.step, None),
        )
        if value is not None
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _stretch_as_dict(stretch: Stretch) -> dict[str, Any]:
    values: Sequence[dict[str, Any]] = [
        {"name": name, "value": text, "lines": n} for (name, text), n in stretch.values.items()
    ]
    return {
        "dialect": stretch.dialect,
        "first_line": stretch.first_line,
        "last_line": stretch.last_line,
        "first": asdict(stretch.first),
        "last": asdict(stretch.last),
        "lines": stretch.n_lines,
        "values": values,
        "excerpt": stretch.excerpt,
    }
