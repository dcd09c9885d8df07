"""Output of `fastguard scan` as text and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fastguard.commands.scan.budget import Counted
from fastguard.commands.scan.findings import STEPS
from fastguard.commands.scan.found import LogScan, Stretch
from fastguard.commands.scan.reading import Place
from fastguard.commands.scan.series import RULE, Growth, Series, Spike
from fastguard.commands.terminal import print_table, printable

ROWS = 50
"""Maximum number of stretches in a table; the JSON lists all stretches that are kept."""

SPIKES = 8
"""Maximum number of spikes per series in the text."""


def as_dict(log: str, found: LogScan) -> dict[str, Any]:
    """All results as JSON values."""
    return {
        "file": log,
        "lines": found.n_lines,
        "bad_lines": found.n_bad,
        "n_stretches": found.n_stretches,
        "stretches": [_stretch_as_dict(stretch) for stretch in found.stretches],
        "series": [_series_as_dict(series, growth) for series, growth in found.series],
        "mentions": found.n_mentions,
        "first_mention": None if found.mention is None else found.mention._asdict(),
        "fastguard_records": found.n_records,
        "only_counted": _counted_as_dict(found.counted),
        "problem": found.problem,
    }


def print_text(log: str, found: LogScan) -> None:
    """Prints the number of bad lines, a table of the stretches, and the series with spikes."""
    name = printable(log)
    lines = _lines(found.n_lines)
    if found.n_bad:
        first = found.stretches[0]
        steps = _steps(first)
        at_least = "at least " if found.counted.n_nonfinite else ""
        and_steps = f"; steps {steps}" if len(first.steps) > 1 else ""
        print(
            f"{name}: NaN or Inf in {at_least}{found.n_bad:,} of {lines}, first in line "
            f"{first.first_line:,}{_in_words(first.first)}{and_steps}"
        )
        rows = [_row(stretch) for stretch in found.stretches[:ROWS]]
        print_table(["line", "epoch", "batch", "step", "lines", "values", "written by"], rows)
        if found.n_stretches > ROWS:
            print(f"... and {found.n_stretches - ROWS:,} more (--json has up to 1,000)")
    else:
        print(f"{name}: no NaN or Inf in {_lines(found.n_lines - found.counted.n_nonfinite)}")
    for series, growth in found.series:
        for sentence in _judgement(series, growth):
            print(f"{printable(series.name)}: {sentence}")
    _print_notes(found)


def _lines(n: int) -> str:
    return f"{n:,} line{'s' * (n != 1)}"


def _print_notes(found: LogScan) -> None:
    if found.counted.n_lines:
        print(f"note: {_counted(found.counted)}")
    if found.mention is not None:
        print(
            f"note: {_lines(found.n_mentions)} with NaN or Inf as a word, not as a value; line "
            f"{found.mention.number:,}: {printable(found.mention.text)}"
        )
    if found.n_records and found.problem is None:
        are = "is a fastguard record" if found.n_records == 1 else "are fastguard records"
        print(f"note: {_lines(found.n_records)} {are}, not judged here; use: fastguard report")
    if found.problem is not None:
        print(f"note: not read to its end: {found.problem}")


def _counted(counted: Counted) -> str:
    """Describes the lines that were only searched."""
    n, first = counted.n_nonfinite, counted.first
    between = f"{counted.first_line:,} to {counted.last_line:,}"
    contain = "none contains NaN or Inf"
    if first is not None:
        text = printable(first.text)
        contain = f"{n:,} contain{'s' * (n == 1)} NaN or Inf, first line {first.number:,}: {text}"
    return (
        f"to bound the time, {_lines(counted.n_lines)} in the range {between} were only searched "
        f"for NaN and Inf, not analyzed: {contain} (--full analyzes all)"
    )


def _judgement(series: Series, growth: Growth | None) -> Iterator[str]:
    """Sentences about growth, and about the steps that the rule would have skipped."""
    if series.n_spikes:
        shown = series.spikes[:SPIKES]
        places = [_at(spike.place, spike.line) for spike in shown]
        units = {unit for unit, _ in places}
        unit = units.pop() if len(units) == 1 else "place"
        at = f"{unit}{'s' * (len(places) > 1)} {', '.join(number for _, number in places)}"
        more = f" and {series.n_spikes - len(shown):,} more" if series.n_spikes > len(shown) else ""
        first, largest = shown[0], series.largest
        further = ""
        if largest is not None and series.n_spikes > len(shown):
            further = f"; the largest at {' '.join(_at(largest.place, largest.line))}: "
            further += f"{largest.value:.4g}, where {largest.threshold:.4g} is"
        if not series.alarms:
            further += (
                "; not an alarm, because noise alone explains this in a series of this length"
            )
        yield (
            f"SpikeRule(sigma={RULE.sigma:g}) would have skipped {at}{more}: {first.value:.4g}, "
            f"where {first.threshold:.4g} is accepted (window={RULE.window}, "
            f"warmup={RULE.warmup}){further}"
        )
    if growth is not None:
        yield (
            f"climbing since {' '.join(_at(growth.place, growth.line))}, from {growth.low:.4g} to "
            f"{growth.end:.4g}"
        )


def _at(place: Place, line: int) -> tuple[str, str]:
    """The unit and the number that identify a row."""
    if place.step is not None:
        return "step", str(place.step)
    if place.epoch is not None:
        return "epoch", f"{place.epoch:g}"
    return "line", str(line)


def print_problem(log: str, found: LogScan) -> None:
    """Prints to stderr why a log without NaN or Inf was not fully checked."""
    told = f"fastguard scan: {printable(log)}: {found.problem}"
    if found.n_lines > found.n_records:
        told += f"; no NaN or Inf in the {found.n_lines:,} lines before"
    print(told, file=sys.stderr)


def _row(stretch: Stretch) -> list[str]:
    first, last = stretch.first, stretch.last
    return [
        _range(stretch.first_line, stretch.last_line),
        _range(first.epoch, last.epoch, first.epochs),
        _range(first.batch, last.batch, last.batches),
        _steps(stretch) or _range(first.step, last.step),
        f"{stretch.n_lines:,}",
        ", ".join(printable(f"{name} {text}".strip()) for name, text in stretch.values),
        stretch.dialect,
    ]


def _steps(stretch: Stretch) -> str:
    """The steps of a stretch if they are known and few; else ""."""
    steps = stretch.steps
    return ", ".join(map(str, steps)) if 0 < len(steps) < STEPS else ""


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
        "first": stretch.first._asdict(),
        "last": stretch.last._asdict(),
        "lines": stretch.n_lines,
        "values": values,
        "steps": stretch.steps[:STEPS],
        "excerpt": stretch.excerpt,
    }


def _counted_as_dict(counted: Counted) -> dict[str, Any] | None:
    if not counted.n_lines:
        return None
    return {
        "first_line": counted.first_line,
        "last_line": counted.last_line,
        "lines": counted.n_lines,
        "with_nonfinite": counted.n_nonfinite,
        "first": None if counted.first is None else counted.first._asdict(),
    }


def _series_as_dict(series: Series, growth: Growth | None) -> dict[str, Any]:
    spikes: Sequence[dict[str, Any]] = [_placed(spike) for spike in series.spikes]
    return {
        "name": series.name,
        "rule": {"sigma": RULE.sigma, "window": RULE.window, "warmup": RULE.warmup},
        "n_spikes": series.n_spikes,
        "spikes": spikes,
        "largest_spike": None if series.largest is None else _placed(series.largest),
        "alarm": series.alarms or growth is not None,
        "climbing_since": None if growth is None else _placed(growth),
    }


def _placed(entry: Spike | Growth) -> dict[str, Any]:
    return {**entry._asdict(), "place": entry.place._asdict()}
