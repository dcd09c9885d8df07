"""`Follower`: reads the lines of a run, old and new, across rotation, replacement and truncation.

A `JsonLinesSink` closes a full file, renames it and opens a new one under the old name. A renamed
file therefore receives no more lines: once the rename is noticed, reading to the end completes the
file. If several rotations happened between two polls, the newer rotated files are read in order
before the current one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastguard.records.rotated_files import (
    Identity,
    identity_at,
    identity_of,
    open_at,
    rotated_files,
    split_at_current,
)

BLOCK = 1 << 20
"""Bytes read at once; a line of at least this length is treated as damaged."""


class Lines:
    """Splits chunks of bytes into lines.

    If a line is longer than `BLOCK`, only its start is returned, which is not a valid record.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._dropping = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns the lines completed by `chunk`, without newlines."""
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
        """Returns the incomplete last line, and removes it."""
        rest, self._rest, self._dropping = self._rest, b"", False
        return rest


class Follower:
    """Reads a run from its oldest file on, then the lines appended to it.

    Args:
        path: The current file of a `JsonLinesSink`; it does not have to exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = Lines()
        self._file = -1
        self._identity: Identity = (0, 0)
        self._offset = 0
        self._newest: Path | None = None  # the latest rotated file that was read
        self._begin()

    def poll(self) -> Iterator[bytes]:
        """Yields the lines completed since the last call. Never blocks.

        Raises:
            OSError: The file cannot be read.
        """
        while True:
            # Checks for a newer file before reading, since nothing is written to a file after it
            # was renamed.
            is_current = self._file >= 0 and identity_at(self.path) == self._identity
            yield from self._read_to_end()
            if is_current or not self._open_next():
                return
            yield from self.finish()

    def finish(self) -> Iterator[bytes]:
        """Yields the incomplete last line, if any. Call this after the file is complete."""
        rest = self._lines.flush()
        if rest:
            yield rest

    def age(self, now: float) -> float | None:
        """Seconds from the last write to the file until `now`; None if there is no file."""
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
        older, _ = split_at_current(self.path, found, full[-1] if full else None)
        if not self._take_first(older, current) and current is not None:
            self._take(current)

    def _open_next(self) -> bool:
        """Opens the next file after the current one; returns False if there is none yet."""
        # opened before the folder is listed, so that no file is missed
        current = open_at(self.path)
        older, newer = split_at_current(self.path, self._identity, self._newest)
        if self._take_first(newer, current):
            return True
        if current is None or identity_of(os.fstat(current)) == self._identity:
            if current is not None:
                os.close(current)
            return False
        self._newest = [*older, *newer][-1] if older or newer else None
        self._take(current)
        return True

    def _take_first(self, full: Iterable[Path], current: int | None) -> bool:
        """Opens the first full file that the sink has not deleted; closes `current` then."""
        for path in full:
            file = open_at(path)
            if file is not None:
                if current is not None:
                    os.close(current)
                self._newest = path
                self._take(file)
                return True
        return False

    def _take(self, file: int) -> None:
        self.close()
        self._file, self._identity, self._offset = file, identity_of(os.fstat(file)), 0

    def _read_to_end(self) -> Iterator[bytes]:
        if self._file < 0:
            return
        try:
            # the file was truncated and written again
            if os.fstat(self._file).st_size < self._offset:
                self._offset = 0
                self._lines.flush()
            while chunk := os.pread(self._file, BLOCK, self._offset):
                self._offset += len(chunk)
                yield from self._lines.feed(chunk)
        except OSError as error:
            if error.errno != errno.ESTALE:  # ESTALE: another machine deleted the file on NFS
                raise
