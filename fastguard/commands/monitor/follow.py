"""`Follower`: the lines of a run, old and new, through rotation, replacement and truncation.

A `JsonLinesSink` closes a full file, renames it and opens a new one under the old name. So a file
that is no longer the one under its name, and has been read to its end after that was seen, has
nothing more to give. What was written between two looks may span several rotations: the files
after ours, in their order, come before the current one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from fastguard.records.rotated_files import (
    Identity,
    around,
    identity_at,
    identity_of,
    open_at,
    rotated_files,
)

BLOCK = 1 << 20
"""Bytes read at once, and the length from which a line is no record but damage."""


class Lines:
    """Joins chunks of bytes to lines; one that grows beyond `BLOCK` is given up: its beginning
    comes as a line, which is no record.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._dropping = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their newlines."""
        *whole, rest = (self._rest + chunk).split(b"\n")
        if self._dropping and whole:
            del whole[0]
            self._dropping = False
        self._rest = b"" if self._dropping else rest
        if len(self._rest) > BLOCK:
            whole.append(self._rest)
            self._rest, self._dropping = b"", True
        return whole

    def flush(self) -> bytes:
        """What there is of a line whose end has not come; forgotten here."""
        rest, self._rest, self._dropping = self._rest, b"", False
        return rest


class Follower:
    """Reads a run from its oldest file, then what is appended, whatever file has the name by then.

    Args:
        path: The current file of a `JsonLinesSink`; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = Lines()
        self._file = -1
        self._identity: Identity = (0, 0)
        self._offset = 0
        self._newest: Path | None = None  # the latest rotated file that need not be read again
        self._begin()

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

    def _begin(self) -> None:
        full = rotated_files(self.path)
        current = open_at(self.path)
        found = None if current is None else identity_of(os.fstat(current))
        older, _ = around(self.path, found, full[-1] if full else None)
        for path in older:  # the sink may have deleted the first ones
            file = open_at(path)
            if file is not None:
                if current is not None:
                    os.close(current)
                self._newest = path
                self._take(file)
                return
        if current is not None:
            self._take(current)

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
