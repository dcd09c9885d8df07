"""Reads the records of a run from disk once, in order and with bounded memory.

`read_records` yields one `StepRecord` at a time, at about 20 µs per line. `read_blocks` is for
files of gigabytes, at about 3 µs per line: it parses a block in one call into plain dicts. Lines
that are not records (truncated by a kill, zeroed by a crash, edited by hand) are skipped and
counted; headers are skipped. The records of a run are in the current file of a `JsonLinesSink` and
its rotated files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from fastguard.errors.logger import log
from fastguard.errors.plain_text import printable, shown
from fastguard.records.regular_files import folder_error
from fastguard.records.rotated_files import open_run
from fastguard.records.run_header import is_header, parse_header
from fastguard.records.step_record import FIELDS, StepRecord

try:  # orjson is twice as fast as json, which is used for what orjson refuses, such as a bare NaN
    from orjson import loads as _loads
except ImportError:
    _loads: Callable[[bytes], Any] = json.loads

_required = itemgetter("step", "total_norm", "clip_coef", "action")  # the fields without a default
_NUMBERS = frozenset({int, float, str})  # strings, for NaN and infinities

BLOCK_BYTES = 512 << 10
"""Bytes to read at a time; also the longest line that can be a record. A parsed block of this size
fits in a core's cache; with 4 MiB, reading takes a fifth longer."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some lines of a run.

    Attributes:
        records: One dict per line that satisfies `are_records`; other fields are unchecked and may
            be missing.
        damaged: Number of lines that were neither records nor headers.
        size: Number of bytes read.
        headers: The headers, as dicts that satisfy `is_header`.
    """

    records: list[dict[str, Any]]
    damaged: int
    size: int
    headers: list[dict[str, Any]] = field(default_factory=list)


def read_blocks(path: Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yields all records of a run, oldest first, while a trainer may continue writing.

    Args:
        path: The current file.
        block_bytes: Bytes to read at a time; also the longest line that can be a record.

    Raises:
        OSError: There is no file, or the file cannot be read, or is a pipe or a device.
    """
    for _, file in open_run(path):
        yield from _blocks(file, block_bytes)


def parse_lines(data: bytes) -> Block:
    """Parses complete lines; ignores blank lines.

    Example:
        >>> line = b'{"step": 1, "total_norm": 2.5, "clip_coef": 1.0, "action": "applied"}'
        >>> block = parse_lines(line + b'\\n\\n{"step": 2, "lr"\\n')
        >>> len(block.records), block.damaged
        (1, 1)
    """
    try:
        # All lines are parsed in one call. A JSON string cannot contain a bare line feed, so a
        # damaged line cannot absorb the start of the next line and still give the right number of
        # items.
        stripped = data.strip()
        found = _loads(b"[" + stripped.replace(b"\n", b",\n") + b"]")
        if len(found) == stripped.count(b"\n") + 1:
            if are_records(found):
                return Block(found, 0, len(data))
            headers = list(filter(is_header, found))
            records = [value for value in found if not is_header(value)]
            if headers and (not records or are_records(records)):
                return Block(records, 0, len(data), headers)
    except (ValueError, RecursionError):
        pass
    return _one_by_one(data.split(b"\n"))


def _one_by_one(lines: Sequence[bytes]) -> Block:
    records, headers, damaged = [], [], 0
    for line in lines:
        if not line.strip():
            continue
        record = _parse(line)
        if are_records([record]):
            records.append(record)
        elif is_header(record):
            headers.append(record)
        else:
            damaged += 1
    return Block(records, damaged, sum(map(len, lines)), headers)


def _parse(line: bytes) -> Any:
    for loads in (_loads, json.loads):
        try:
            return loads(line)
        except (ValueError, RecursionError):
            continue
    return None


def are_records(values: list[Any]) -> bool:
    """Whether all of these JSON values are fastguard records, of this version or a later one.

    All readers use this check, which covers only the existence and the types of the required
    fields. The loops over the values run in C.

    Example:
        >>> are_records([{"step": 3, "total_norm": "NaN", "clip_coef": 1, "action": "skipped"}])
        True
        >>> are_records([{"step": 3, "loss": 0.5}])
        False
    """
    if set(map(type, values)) != {dict}:
        return False
    try:
        steps, *numbers, actions = zip(*map(_required, values), strict=True)
    except KeyError:
        return False
    if set(map(type, steps)) != {int} or set(map(type, actions)) != {str}:
        return False
    return (
        0 <= min(steps)
        and max(steps) < 1 << 53
        and all(_NUMBERS.issuperset(map(type, column)) for column in numbers)
    )


def _blocks(file: BinaryIO, block_bytes: int) -> Iterator[Block]:
    rest = b""  # the unfinished last line of the block
    too_long = False  # whether a line that is longer than a block is being dropped
    while data := file.read(block_bytes):
        size = len(data)
        data = rest + data
        end = data.rfind(b"\n") + 1
        whole, rest = data[:end], data[end:]
        damaged = 0
        if too_long and whole:
            whole = whole[whole.find(b"\n") + 1 :]
            too_long, damaged = False, 1
        if len(rest) > block_bytes or too_long:
            rest, too_long = b"", True
        yield _block(whole, size, damaged)
    if too_long:
        yield Block([], 1, 0)
    elif rest.strip():
        yield _block(rest, 0, 0)


def _block(lines: bytes, size: int, damaged: int) -> Block:
    if not lines.strip():
        return Block([], damaged, size)
    block = parse_lines(lines)
    return Block(block.records, damaged + block.damaged, size, block.headers)


LONGEST_LINE = 1 << 24
"""Lines of at least this number of bytes are damaged, not records."""

_COUNTS = (
    "step",
    "nan",
    "posinf",
    "neginf",
    "n_culprits",
    "consecutive_skips",
    "culprit_ranks",
    "clipped_units",
    "limited_units",
)

_FLOATS = ("total_norm", "clip_coef", "lr", "limit", "time")


def read_records(path: str | os.PathLike[str], *, strict: bool = False) -> Iterator[StepRecord]:
    """Yields the records of a `JsonLinesSink`, oldest first, including rotated files.

    The run may continue writing; records up to about the time of the call are read. Headers are
    skipped.

    Args:
        path: The current file.
        strict: Raise at the first line that is not a record, instead of skipping and counting it.
            Default: False.

    Raises:
        FileNotFoundError: Neither this file nor a rotated file exists.
        IsADirectoryError: The path is a folder.
        OSError: A file cannot be read, or is a pipe or a device.
        ValueError: With `strict`, a line is not a record; the message names file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise folder_error(path)
    skipped = 0
    for name, file in open_run(path):
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                yield parse_record(line)
            except ValueError as error:
                if parse_header(line) is not None:
                    continue
                if strict:
                    raise ValueError(
                        f"{printable(str(name))}:{number} is not a record "
                        f"({shown(error, 200, str)}); delete the line, or read with strict=False"
                    ) from None
                skipped += 1
    if skipped:
        lines = "line was" if skipped == 1 else "lines were"
        log.warning("%s: %d damaged %s skipped", path, skipped, lines)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields numbered lines; a line too long to be a record becomes `b"..."`."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                pass
            line = b"..."
        yield number, line


def parse_record(line: bytes) -> StepRecord:
    """Parses one line of a `JsonLinesSink`; unknown fields are ignored.

    Raises:
        ValueError: The line is not a record, or is truncated.

    Example:
        >>> parse_record(b'{"step": 3, "total_norm": "NaN", "clip_coef": 1, "action": "skipped"}')
        StepRecord(step=3, total_norm=nan, clip_coef=1.0, action='skipped', ...)
    """
    try:
        return _record(json.loads(line))
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _record(fields: Any) -> StepRecord:
    if not are_records([fields]):
        raise ValueError("not a JSON object with step, total_norm, clip_coef and action")
    fields = {name: value for name, value in fields.items() if name in FIELDS}
    for name in _FLOATS:
        if name in fields:
            fields[name] = float(fields[name])  # `float` also parses "NaN" and "Infinity"
    for name in ("losses", "thresholds"):
        fields[name] = {k: float(v) for k, v in fields.get(name, {}).items()}
    fields["culprits"] = tuple(
        (str(name), _count("nan", nan), _count("posinf", posinf), _count("neginf", neginf))
        for name, nan, posinf, neginf in fields.get("culprits", ())
    )
    if (unit := fields.get("most_clipped_unit")) is not None:
        name, number = unit
        fields["most_clipped_unit"] = str(name), _count("most_clipped_unit", number)
    fields["watch"] = _numbers(dict(fields.get("watch", {})))
    fields["spikes"] = tuple(map(str, fields.get("spikes", ())))
    record = StepRecord(**fields)
    for name in _COUNTS:
        _count(name, getattr(record, name))
    if record.culprit_rank is not None:
        _count("culprit_rank", record.culprit_rank)
    if not isinstance(record.action, str) or not isinstance(record.reason, str | None):
        what = f"action {shown(record.action)} and reason {shown(record.reason)}"
        raise ValueError(f"{what}: expected text (or null as reason)")
    return record


def _numbers(value: Any) -> Any:
    """Returns the value with the strings for NaN and infinities replaced with floats."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _count(name: str, value: Any) -> int:
    # Above 2^53, a float64 and thus many JSON parsers cannot represent every integer.
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{name} is {shown(value)}; expected an integer from 0 to 2^53 - 1")
    return value
