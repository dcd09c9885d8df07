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
from fastguard.commands.monitor.watch import bounded
from fastguard.records.read_json_lines import parse_record
from fastguard.records.rotated_files import index_of, open_at, rotated_files
from fastguard.records.step_record import StepRecord

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
                    record = bounded(parse_record(line))
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
        file = None if path is None else open_at(path)
        if file is None:  # the sink keeps a limited number of files
            continue
        try:
            size = os.fstat(file).st_size
            yield from whole_lines_backwards(file, size if end is None else min(end, size))
        finally:
            os.close(file)


def _same_file(earlier: Earlier) -> Path | None:
    """Where the file is now in which the follower began."""
    assert earlier.file is not None
    files = [*rotated_files(earlier.file), earlier.file]
    i = index_of(earlier.identity, files)
    return None if i is None else files[i]
