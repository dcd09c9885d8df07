"""Writes files of lines: one descriptor and one lock per file, with rotation.

All sinks of a process that write to the same path share one `LineWriter`, on any thread. A second
process gets an error, since two processes that rotate would rename each other's files. The lock is
a `flock` on the file itself, which the system releases when the process ends for any reason. A
forked child, such as a data loader worker, first closes the descriptors that it inherited; it may
write once its parent has closed the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path
from typing import ClassVar

from fastguard.errors.logger import log
from fastguard.records.regular_files import check_regular
from fastguard.records.rotated_files import (
    full_file,
    identity_at,
    identity_of,
    number_of,
    open_at,
    rotated_files,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
for _name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of `flock` on file systems without locks."""


class LineWriter:
    """Appends lines to a file and rotates it; created by `LineWriter.of`.

    While a line is being written, a signal handler may write another line or close the writer. Such
    a nested call writes to the open file if there is one; it never opens or closes a file.

    Attributes:
        path: The path, made absolute because a program may change its working directory.
        lock: Held while a line is written; callers may hold it for longer.
    """

    _all: ClassVar[weakref.WeakValueDictionary[str, LineWriter]] = weakref.WeakValueDictionary()
    _all_lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: threading.RLock = threading.RLock()
        self._users = 0
        self._is_at_work = False
        self._cannot_rotate = False
        self._forget()

    @classmethod
    def of(cls, path: Path) -> LineWriter:
        """Returns this process's writer for a path; each caller calls `leave` when done."""
        path = Path(os.path.abspath(path))
        key = os.path.join(os.path.realpath(path.parent), path.name)
        with cls._all_lock:
            writer = cls._all.get(key)
            if writer is None:
                writer = cls._all[key] = cls(path)
            writer._users += 1
            return writer

    def open(self) -> None:
        """Opens and locks the file unless it is open.

        Raises:
            BlockingIOError: Another process writes to the file.
            OSError: The file cannot be opened for writing, or is a pipe, a device or a folder.
        """
        with self.lock:
            if self._file < 0 and not self._is_at_work:
                try:
                    self._is_at_work = True
                    self._open()
                finally:
                    self._stop()

    def append(
        self,
        line: bytes,
        max_bytes: int,
        keep: int | None,
        *,
        header: bytes = b"",
        begins: bool = False,
    ) -> None:
        """Writes one line with a single system call.

        Args:
            line: The line, including its newline.
            max_bytes: The file is rotated first if it would become larger than this.
            keep: Number of full files to keep; None: all.
            header: A line to write before the first line of a file.
            begins: Whether to write the header before this line in any file.

        Raises:
            OSError: The line could not be written and is lost.
        """
        with self.lock:
            if self._is_at_work:
                found = self._stat()
                if found is None:
                    raise OSError("a signal arrived while the file was being opened")
                self._write(header + line if begins or not found.st_size else line)
                return
            try:
                self._is_at_work = True
                size = self._size()
                data = header + line if begins or not size else line
                if size and size + len(data) > max_bytes:
                    self._rotate(keep)
                    data = header + line if begins or not self._size() else line
                self._write(data)
            finally:
                self._stop()

    def flush(self) -> None:
        """Blocks until everything written is on disk."""
        with self.lock:
            if self._stat() is not None:
                os.fsync(self._file)

    def leave(self) -> None:
        """Ends the use by one caller; closes the file after the last caller."""
        with self.lock:
            self._users -= 1
            if not self._is_at_work:
                self._stop()

    def __del__(self) -> None:
        self._release()  # a caller may have been deleted without calling `leave`

    def _stop(self) -> None:
        self._is_at_work = False
        if self._users <= 0:
            self._release()

    def _stat(self) -> os.stat_result | None:
        """Returns the `stat` of the open file; None if the descriptor no longer refers to it.

        A process that becomes a daemon may close all descriptors. The next file that it opens may
        get the same number.
        """
        if self._file < 0:
            return None
        with contextlib.suppress(OSError):  # the file is not open, or was lost on a network
            found = os.fstat(self._file)
            if identity_of(found) == self._identity:
                return found
        return None

    def _size(self) -> int:
        """Returns the size of the file, after reopening it if it was deleted."""
        found = self._stat()
        if found is None or not found.st_nlink:
            self._release()
            self._open()
            found = os.fstat(self._file)
        return found.st_size

    def _open(self) -> None:
        self._take(_opened(self.path))
        if _rotates_elsewhere(self.path):
            self._release()
            raise _in_use(self.path)

    def _write(self, line: bytes) -> None:
        data = b"\n" + line if self._is_cut else line
        written = os.write(self._file, data)
        self._is_cut = written < len(data)
        if self._is_cut:
            raise OSError(f"only {written} of {len(data)} bytes were written")

    def _rotate(self, keep: int | None) -> None:
        """Renames the full file and starts the next one.

        The full file stays open and locked until the next file is locked, so that no other process
        can take over in between. If the next file cannot be opened, lines go to the full file, and
        the next line tries again.
        """
        try:
            # otherwise the file has already been renamed
            if identity_at(self.path) == self._identity:
                full = rotated_files(self.path)
                number = 1 + (number_of(self.path, full[-1]) if full else 0)
                # skips a folder of another program
                while (new := full_file(self.path, number)).is_dir():
                    number += 1
                os.rename(self.path, new)
            self._take(_opened(self.path))
        # another process has just locked the file, and is about to release it
        except BlockingIOError:
            return
        except OSError as error:
            if not self._cannot_rotate:
                self._cannot_rotate = True
                log.warning("cannot rotate %s, so it grows beyond max_bytes: %s", self.path, error)
            return
        self._cannot_rotate = False
        _delete(self.path, keep)

    def _take(self, file: int) -> None:
        """Switches to a newly opened file and closes the previous one."""
        identity = identity_of(os.fstat(file))
        before = -1 if self._stat() is None else self._file
        self._file, self._identity, self._is_cut = file, identity, False
        if before >= 0:
            os.close(before)

    def _release(self) -> None:
        """Closes the file after clearing the descriptor, whose number may be reused at once."""
        file = -1 if self._stat() is None else self._file
        self._forget()
        if file >= 0:
            os.close(file)

    def _forget(self) -> None:
        self._file, self._identity, self._is_cut = -1, (-1, -1), False

    @classmethod
    def release_all(cls) -> None:
        """Closes the descriptors that a forked child inherited; the parent keeps its locks."""
        cls._all_lock = threading.Lock()
        for writer in list(cls._all.values()):
            writer.lock = threading.RLock()  # another thread of the parent may have held the lock
            writer._is_at_work = False
            writer._release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LineWriter.release_all)


def _opened(path: Path) -> int:
    """Opens or creates the file, locks it, and terminates a truncated last line."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            # The check comes before opening, since opening some devices has side effects.
            check_regular(os.stat(path), path)
        file = os.open(path, _FLAGS, 0o644)
        try:
            found = os.fstat(file)
            check_regular(found, path)
            if not _locked(file, path):
                raise _in_use(path, file)
            if identity_at(path) == identity_of(found):
                if found.st_size and os.pread(file, 1, found.st_size - 1) != b"\n":
                    os.write(file, b"\n")
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # another process renamed the file before it was locked here


def _locked(file: int, path: Path) -> bool:
    """Takes the lock; returns False if another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "the file system of %s has no locks; make sure that no other process writes records "
            "to this file",
            path,
        )
    return True


def _in_use(path: Path, file: int | None = None) -> BlockingIOError:
    holder = None if file is None else _holder(file)
    owner = "another process" if holder is None else f"process {holder}"
    return BlockingIOError(
        f"{path} is open for writing in {owner}, and only one process may write a file of "
        "records; close the file there, or choose another file. With several ranks, add the sink "
        "on one rank only, and in the process that trains, not in the process that forks it"
    )


def _holder(file: int) -> int | None:
    """Returns the id of the process that holds the lock of an open file, if known."""
    found = os.fstat(file)
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # such as "1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF"
            if fields[1] == "FLOCK" and fields[5] == name and int(fields[4]) > 0:
                return int(fields[4])
    return None


def _rotates_elsewhere(path: Path) -> bool:
    """Whether another process has renamed the file and has not started the next file yet."""
    for newest in rotated_files(path)[-1:]:
        with contextlib.suppress(OSError):
            file = open_at(newest)
            if file is not None:
                try:
                    return not _locked(file, newest)
                finally:
                    os.close(file)
    return False


def _delete(path: Path, keep: int | None) -> None:
    """Deletes the oldest full files beyond `keep`; logs a warning if that fails."""
    if keep is None:
        return
    full = rotated_files(path)
    for old in full[: max(0, len(full) - keep)]:
        try:
            os.unlink(old)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("cannot delete a full file of records: %s", error)
            return
