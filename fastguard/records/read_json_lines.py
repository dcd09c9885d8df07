"""The records of a run as they lie on the disk, read once, in order and with bounded memory.

`read_records` gives one `StepRecord` at a time, at some 20 µs a line. This is the road for files
of gigabytes, at 3: a block at a time, parsed in one call, each line a plain dict. What is
no record (cut short by a kill, zeroed by a crash, edited by hand) is counted and left out, never
fatal. A run is the current file of a `JsonLinesSink` and the full ones beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastguard.records.rotated_files import open_run

try:  # twice as fast as the standard library; what it refuses (a bare NaN), that one reads
    from orjson import loads as _loads
except ImportError:
    _loads: Callable[[bytes], Any] = json.loads

BLOCK_BYTES = 512 << 10
"""How much is read at a time, and the longest line that is a record. What a block becomes still
fits a core's cache: with 4 MiB it takes a fifth longer."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some lines of a run.

    Attributes:
        records: One dict a line, each with an integer `"step"`; everything else is as it was found,
            and may be missing.
        damaged: How many lines were no record.
        size: Bytes read for it.
    """

    records: list[dict[str, Any]]
    damaged: int
    size: int


def read_blocks(path: Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All records of a run, oldest first, while a trainer may go on writing to it.

    Args:
        path: The current file.
        block_bytes: How much is read at a time, and the longest line that is a record.

    Raises:
        OSError: There is no file, or one cannot be read, or is a pipe or a device.
    """
    for _, file in open_run(path):
        yield from _blocks(file, block_bytes)


def parse_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records in some whole lines, and how many lines were none; blank lines are neither.

    Example:
        >>> parse_lines(b'{"step": 1}\\n\\n{"step": 2, "lr"\\n')
        ([{'step': 1}], 1)
    """
    try:
        # One call for all. A string cannot hold a bare line feed, so no damaged line can swallow
        # the start of the next and still be JSON of as many items.
        stripped = data.strip()
        found = _loads(b"[" + stripped.replace(b"\n", b",\n") + b"]")
        if len(found) == stripped.count(b"\n") + 1 and _are_records(found):
            return found, 0
    except (ValueError, RecursionError):
        pass
    return _one_by_one(data.split(b"\n"))


def _one_by_one(lines: Sequence[bytes]) -> tuple[list[dict[str, Any]], int]:
    records, damaged = [], 0
    for line in lines:
        if not line.strip():
            continue
        record = _parse(line)
        if _are_records([record]):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _parse(line: bytes) -> Any:
    for loads in (_loads, json.loads):
        try:
            return loads(line)
        except (ValueError, RecursionError):
            continue
    return None


def _are_records(values: list[Any]) -> bool:
    """Whether each is a dict with a step; written so that the loops over them run in C."""
    if set(map(type, values)) != {dict}:
        return False
    steps = [value.get("step") for value in values]
    return set(map(type, steps)) == {int} and 0 <= min(steps) and max(steps) < 1 << 53


def _blocks(file: BinaryIO, block_bytes: int) -> Iterator[Block]:
    rest = b""  # the line that the block ended in
    too_long = False  # `rest` is what followed the first block of a line without end
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
    records, more = parse_lines(lines)
    return Block(records, damaged + more, size)
