"""`History`: the incidents before the tail, searched for backwards, a slice of time at a time.

Only lines whose `reason` is not null are parsed; the others are counted as blocks of bytes go by,
at about 1 GB/s where parsing makes 30 MB/s. The file may be larger than anybody would wait for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fastguard.commands.monitor.follow import Earlier
from fastguard.commands.monitor.tail import whole_lines_backwards
from fastguard.sinks import parse_record, rotated_files
from fastguard.step_record import StepRecord

INCIDENT = b'"reason": "'
"""What the line of an incident holds, as `JsonLinesSink` writes it; in others it is null."""


class History:
    """Reads back from where a follower began.

    Args:
        earlier: Where that was.
        keep: How many incidents are kept, the latest.

    Attributes:
        incidents: The latest before the tail, newest first.
        n_incidents: How many were found in all.
        n_steps: In how many lines.
        done: Whether the beginning has been reached.
    """

    def __init__(self, earlier: Earlier, keep: int) -> None:
        self.incidents: deque[StepRecord] = deque()
        self.n_incidents = 0
        self.n_steps = 0
        self.done = False
        self._keep = keep
        self._blocks = _blocks(earlier)

    def search(self, seconds: float) -> None:
        """Reads on for about this long."""
        until = time.monotonic() + seconds
        while not self.done:
            block = next(self._blocks, None)
            if block is None:
                self.done = True
                return
            self.n_steps += block.count(b"\n")
            for line in _incident_lines(block):
                try:
                    record = parse_record(line)
                except ValueError:
                    continue
                if record.is_incident:
                    self.n_incidents += 1
                    if len(self.incidents) < self._keep:
                        self.incidents.append(record)
            if time.monotonic() >= until:
                return


def _incident_lines(block: bytes) -> Iterator[bytes]:
    """The lines of a block that may be incidents, last first."""
    end = len(block)
    while (at := block.rfind(INCIDENT, 0, end)) >= 0:
        start = block.rfind(b"\n", 0, at) + 1
        stop = block.find(b"\n", at)
        yield block[start : len(block) if stop < 0 else stop]
        end = start


def _blocks(earlier: Earlier) -> Iterator[bytes]:
    if earlier.file is None:
        return
    first = _same_file(earlier)
    for path, end in [(first, earlier.end), *((path, None) for path in reversed(earlier.older))]:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path is not None else -1
        except FileNotFoundError:  # the sink keeps a limited number of files
            continue
        if file < 0:
            continue
        try:
            size = os.fstat(file).st_size
            yield from whole_lines_backwards(file, size if end is None else min(end, size))
        finally:
            os.close(file)


def _same_file(earlier: Earlier) -> Path | None:
    """Where the file is now in which the follower began."""
    assert earlier.file is not None
    for path in (earlier.file, *rotated_files(earlier.file)):
        try:
            found = os.stat(path)
        except FileNotFoundError:
            continue
        if (found.st_dev, found.st_ino) == earlier.identity:
            return path
    return None
