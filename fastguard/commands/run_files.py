"""Which file a command's argument RUN names, and whether it exists yet."""

from __future__ import annotations

import os
from pathlib import Path

from fastguard.commands.usage import UsageError
from fastguard.sinks import rotated_files


def find_run(run: str | os.PathLike[str]) -> Path:
    """The current file of a run.

    Args:
        run: That file, or the folder it lies in.

    Raises:
        UsageError: There is none, or the folder holds several.
    """
    path = Path(run)
    if path.is_dir():
        files = _current_files(path)
        if not files:
            raise UsageError(f"no records in {run}: it holds no .jsonl file; name the file itself")
        if len(files) > 1 and path / "records.jsonl" not in files:
            names = ", ".join(file.name for file in files)
            raise UsageError(f"{run} holds several runs ({names}); name one of the files")
        return files[0] if len(files) == 1 else path / "records.jsonl"
    if not path.exists() and not rotated_files(path):
        raise UsageError(f"no such file: {run}; give what JsonLinesSink(path) was given")
    return path


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


def _current_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.jsonl"))
    full = {old for file in files for old in rotated_files(file)}
    return [file for file in files if file not in full]
