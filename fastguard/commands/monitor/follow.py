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
from fastguard.sinks import rotated_files

Identity = tuple[int, int]  # device and inode: what a file is, whatever its name


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
            is_current = self._file >= 0 and _identity_of(self.path) == self._identity
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
        current = _open(self.path)
        rotated = rotated_files(self.path)
        if current is not None:
            rotated = rotated[: _index(_identity(current), rotated)]
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
            current = _open(path)

    def _open_next(self) -> bool:
        """Goes on to the file after ours; whether there is one yet."""
        current = _open(self.path)  # before looking around, so that no file can slip in between
        rotated = rotated_files(self.path)
        first = _index(self._identity, rotated) + 1
        if first > len(rotated):  # ours has been deleted or replaced
            first = rotated.index(self._newest) + 1 if self._newest in rotated else 0
        for path in rotated[first:]:
            file = _open(path)
            if file is not None:
                if current is not None:
                    os.close(current)
                self._newest = path
                self._take(file)
                return True
        if current is None or _identity(current) == self._identity:
            if current is not None:
                os.close(current)
            return False
        self._newest = rotated[-1] if rotated else None
        self._take(current)
        return True

    def _take(self, file: int) -> None:
        self.close()
        self._file, self._identity, self._offset = file, _identity(file), 0

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


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _identity(file: int) -> Identity:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _identity_of(path: Path) -> Identity | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _index(identity: Identity, files: Sequence[Path]) -> int:
    """Which of the files it is; their number if it is none of them."""
    for i in reversed(range(len(files))):  # what was rotated lately is asked for most
        if _identity_of(files[i]) == identity:
            return i
    return len(files)
