"""Finds the records file for a command's RUN argument, and detects which program wrote it."""

from __future__ import annotations

import codecs
import json
import os
import shlex
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

from fastguard.commands.terminal import printable
from fastguard.commands.usage import UsageError
from fastguard.records.read_json_lines import are_records
from fastguard.records.regular_files import open_regular
from fastguard.records.rotated_files import rotated_files
from fastguard.records.run_header import is_header
from fastguard.records.step_record import FIELDS

Writer = Literal["fastguard", "another program", "unknown"]

PREFIX_BYTES = 256 << 10
"""Number of bytes read from the start of a file to detect which program wrote it."""


def detect_writer(lines: Iterable[bytes | str]) -> Writer:
    """Detects which program wrote these JSON lines; used by `report`, `monitor` and `scan`.

    One record or header is enough for `"fastguard"`, since a crash may leave truncated or
    zero-filled lines at the start of a file. A JSON object with keys that no record has means
    `"another program"`; anything else means `"unknown"`.

    Example:
        >>> detect_writer(['{"step": 3, "total_norm": 1.5, "clip_coef": 1, "action": "applied"}'])
        'fastguard'
        >>> detect_writer(['{"step": 3, "loss": NaN}'])
        'another program'
        >>> detect_writer(["epoch 3 loss nan"])
        'unknown'
    """
    writer: Writer = "unknown"
    for line in lines:
        if isinstance(line, bytes):  # `json.loads` skips a byte order mark
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.lstrip()[:1] not in ("{", b"{"):
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if are_records([found]) or is_header(found):
            return "fastguard"
        if found.keys() - set(FIELDS):
            writer = "another program"
    return writer


def refuse_foreign_lines(run: Path) -> None:
    """Checks the start of a run's newest non-empty file.

    Raises:
        UsageError: The file holds JSON lines, but no fastguard record.
    """
    for path in (run, *reversed(rotated_files(run))):
        if not path.is_file():
            continue
        try:
            with open_regular(path) as file:
                lines = [*islice(file.read(PREFIX_BYTES).splitlines(), 1000)]
                writer = detect_writer(lines)
        except FileNotFoundError:  # a rotation renamed the file after it was listed
            continue
        name = printable(shlex.quote(str(path)))
        if writer == "another program":
            raise UsageError(
                f"{name} holds JSON lines of another program, not fastguard records; "
                f"use: fastguard scan {name}"
            )
        if writer == "fastguard":
            if any(detect_writer([line]) == "another program" for line in lines):
                print(
                    f"note: {name} also holds JSON lines of another program, which are left out; "
                    f"for them use: fastguard scan {name}",
                    file=sys.stderr,
                )
            return


def raise_no_records(path: Path, damaged: int) -> NoReturn:
    """Reports a run that has no valid record.

    Raises:
        UsageError: Always; the message says what to do.
    """
    if not damaged:
        raise UsageError(
            f"{path} is empty: no step has been recorded yet; use fastguard monitor --wait to "
            "wait for the first record"
        )
    name = printable(shlex.quote(str(path)))
    start = b""
    if path.is_file():
        with open_regular(path) as file:
            start = file.read(PREFIX_BYTES)
    if start.startswith(b"\x1f\x8b"):
        raise UsageError(f"{name} is compressed with gzip; unpack it first: gunzip -k {name}")
    if b'"clip_coef"' in start and b'"action"' in start:
        raise UsageError(
            f"{name} seems to hold fastguard records, but not one per line as JsonLinesSink writes "
            "them; pass the original file"
        )
    lines = "the only line is not a record" if damaged == 1 else f"{damaged:,} lines were read"
    raise UsageError(
        f"{name} holds no fastguard record ({lines}); if another program wrote it, use: "
        f"fastguard scan {name}"
    )


def find_run(run: str | os.PathLike[str]) -> Path:
    """Returns the current file of a run.

    Args:
        run: The file, or the folder that contains it.

    Raises:
        UsageError: There is no such file, or the folder holds several runs.
    """
    path = Path(run)
    if path.is_dir():
        files = _current_files(path)
        if not files:
            raise UsageError(
                f"no records in {run}: the folder holds no .jsonl file; pass the file itself"
            )
        if len(files) > 1 and path / "records.jsonl" not in files:
            names = ", ".join(file.name for file in files)
            raise UsageError(f"{run} holds several runs ({names}); pass one of the files")
        return files[0] if len(files) == 1 else path / "records.jsonl"
    if not path.exists() and not rotated_files(path):
        raise UsageError(f"no such file: {run}; pass the path given to JsonLinesSink")
    return path


def run_exists(run: Path) -> bool:
    """Whether the records file exists, or the folder contains one."""
    if run.is_dir():
        return bool(_current_files(run))
    return run.exists() or bool(rotated_files(run))


def records_file(run: str | os.PathLike[str]) -> Path:
    """Returns the current file of a run, after checking that it can hold fastguard records.

    Raises:
        UsageError: There is no file or there are several files, or the file is a pipe or a device,
            or holds the JSON lines of another program.
    """
    path = find_run(run)
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is not a regular file; pass the file of a JsonLinesSink, or save the pipe to "
            "a file first"
        )
    refuse_foreign_lines(path)
    return path


def _current_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.jsonl") if not path.is_dir())
    rotated = {old for file in files for old in rotated_files(file)}
    return [file for file in files if file not in rotated]
