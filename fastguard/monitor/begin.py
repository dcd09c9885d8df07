"""Which file is meant by RUN, and whether it is there yet."""

from __future__ import annotations

from pathlib import Path

from fastguard.records_file import find_run
from fastguard.sinks import rotated_files
from fastguard.usage import UsageError


def begun(run: Path) -> bool:
    """Whether there is any file of the run, or in its folder."""
    if run.is_dir():
        return any(run.glob("*.jsonl"))
    return run.exists() or bool(rotated_files(run))


def file_of(run: Path) -> Path:
    """The current file of a run.

    Raises:
        UsageError: There is none, there are several, or it is a pipe or a device.
    """
    path = find_run(run)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file; give the file of a JsonLinesSink")
    return path
