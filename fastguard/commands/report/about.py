"""Describes where and when a run was recorded, from the header and the times of its records."""

from __future__ import annotations

from datetime import UTC, datetime

from fastguard.commands.monitor.summary import duration
from fastguard.commands.report.summary import Summary


def about(summary: Summary) -> list[str]:
    """Returns one or two lines of plain text; none if the file has neither a header nor times."""
    header, clock = summary.header, summary.clock
    parts = []
    if header is not None:
        where = " on ".join(filter(None, [header.device, header.host]))
        parts += [where] if where else []
    if clock is not None:
        start, end = _utc(clock.start), _utc(clock.end)
        if start[:10] == end[:10]:
            end = end[11:]
        parts += [f"{start.removesuffix(' UTC')} to {end}", duration(clock.end - clock.start)]
    elif header is not None and header.time is not None:
        parts.append(f"started {_utc(header.time)}")
    if summary.starts > 1:
        parts.append(f"started {summary.starts:,} times, the last settings below")
    lines = [", ".join(parts) + "."] if parts else []
    return lines if header is None else [*lines, f"{header.versions()}."]


def _utc(seconds: float) -> str:
    """Formats Unix seconds.

    Example:
        >>> _utc(0.0)
        '1970-01-01 00:00:00 UTC'
    """
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"
