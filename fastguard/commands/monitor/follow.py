"""`Follower`: the lines of a file from its tail on, through rotation, replacement and truncation.

A `JsonLinesSink` closes a full file, renames it and opens a new one under the old name. So a file
that is no longer the one under its name, and has been read to its end after that was seen, has
nothing more to give. What was written between two looks may span several rotations: the files
after ours, in their order, come before the current one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastguard.commands.monitor.tail import BLOCK, Lines, start_of_last_lines
from fastguard.records.rotated_files import (
    Identity,
    around,
    identity_at,
    identity_of,
    open_at,
    rotated_files,
)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What lies before the lines that a follower began with.

    Attributes:
        file: Path of the file in which it began, or None.
        identity: That file, in case it has been renamed since.
        end: Where in that file it began.
        older: The rotated files before that one, oldest first.
    """

    file: Path | None = None
    identity: Identity = (0, 0)
    end: int = 0
    older: Sequence[Path] = ()


class Follower:
    """Reads the last lines of a file, then what is appended, whatever file has the name by then.

    Args:
        path: The current file of a `JsonLinesSink`; it need not exist yet.
        last: How many lines to begin with, damaged ones included.

    Attributes:
        path: As given.
        earlier: Where the lines before those are.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        self.earlier = Earlier()
        self._lines = Lines()
        self._file = -1
        self._identity: Identity = (0, 0)
        self._offset = 0
        self._newest: Path | None = None  # the latest rotated file that need not be read again
        self._begin(last)

    @property
    def overlong(self) -> int:
        """Lines too long to be records, which were given up."""
        return self._lines.overlong

    def poll(self) -> Iterator[bytes]:
        """The lines that have been completed since the last call. Never waits.

        Raises:
            OSError: The file cannot be read.
        """
        while True:
            # Asked before reading: once it has been renamed, nobody writes to it any more.
            is_current = self._file >= 0 and identity_at(self.path) == self._identity
            yield from self._read_to_end()
            if is_current or not self._open_next():
                return
            yield from self.finish()

    def finish(self) -> Iterator[bytes]:
        """The line that was begun and never ended, if any; for when nothing more will come."""
        rest = self._lines.flush()
        if rest:
            yield rest

    def age(self, now: float) -> float | None:
        """Seconds from the last write to the file until `now`; None without a file."""
        return None if self._file < 0 else max(0.0, now - os.fstat(self._file).st_mtime)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self, last: int) -> None:
        before = rotated_files(self.path)
        current = open_at(self.path)
        found = None if current is None else identity_of(os.fstat(current))
        rotated, _ = around(self.path, found, before[-1] if before else None)
        self._newest = rotated[-1] if rotated else None
        path = self.path
        while True:
            if current is not None:
                self._take(current)
                end = os.fstat(current).st_size
                self._offset, found = start_of_last_lines(current, end, last)
                self.earlier = Earlier(path, self._identity, self._offset, tuple(rotated))
                last -= found
            if last <= 0 or not rotated:
                return
            path = rotated.pop()
            current = open_at(path)

    def _open_next(self) -> bool:
        """Goes on to the file after ours; whether there is one yet."""
        current = open_at(self.path)  # before looking around, so that no file can slip in between
        older, newer = around(self.path, self._identity, self._newest)
        for path in newer:
            file = open_at(path)
            if file is not None:
                if current is not None:
                    os.close(current)
                self._newest = path
                self._take(file)
                return True
        if current is None or identity_of(os.fstat(current)) == self._identity:
            if current is not None:
                os.close(current)
            return False
        self._newest = [*older, *newer][-1] if older or newer else None
        self._take(current)
        return True

    def _take(self, file: int) -> None:
        self.close()
        self._file, self._identity, self._offset = file, identity_of(os.fstat(file)), 0

    def _read_to_end(self) -> Iterator[bytes]:
        if self._file < 0:
            return
        try:
            if os.fstat(self._file).st_size < self._offset:  # truncated: begun anew
                self._offset = 0
                self._lines.flush()
            while chunk := os.pread(self._file, BLOCK, self._offset):
                self._offset += len(chunk)
                yield from self._lines.feed(chunk)
        except OSError as error:
            if error.errno != errno.ESTALE:  # on NFS: deleted by another machine
                raise
