"""Crash-safe writes: after a crash, a path holds either the old file or the new one.

Each write goes to a temporary file in the same folder, which is flushed to disk and renamed; then
the folder is flushed too. The names of files left behind by a crash start with `TEMPORARY`; the
next writer removes them.

Links are not followed, and existing files are never opened for writing, because a folder from an
untrusted source may contain links with the names to be written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastguard.checkpoints.errors import StoreLocked
from fastguard.records.regular_files import check_regular, open_regular

try:
    import fcntl
except ImportError:  # on Windows there is no lock, so the user must ensure that there is one writer
    fcntl = None

TEMPORARY = ".tmp-"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


class Sink:
    """A file for `torch.save` that keeps disk errors.

    torch's C++ writer would turn disk errors into assertion failures. This class keeps the first
    `OSError` for `raise_if_failed`, and discards later writes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Writes data and returns its length; discards data after an error."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self._error is None:
            try:
                done += self._file.write(view[done:])
            except OSError as error:
                self._error = error
        return len(view)

    def flush(self) -> None:
        """Does nothing: the file is flushed once, after everything is written."""
        pass

    def raise_if_failed(self) -> None:
        """Raises the first `OSError`, if any."""
        if self._error is not None:
            raise self._error


def write_temporary(path: Path, write: Callable[[Sink], object]) -> Path:
    """Writes the future contents of `path` to a temporary file and flushes it to disk.

    Returns:
        The temporary file; pass it to `commit` or unlink it.

    Raises:
        OSError: The disk is full, read-only or broken; nothing is left behind. Or the temporary
            name belongs to something other than a regular file, which is not touched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with contextlib.suppress(FileNotFoundError):
        check_regular(os.lstat(temporary), temporary)
        temporary.unlink()
    handle = os.open(temporary, _NEW, 0o666)
    try:
        with open(handle, "wb", buffering=0) as file:
            sink = Sink(file)
            try:
                write(sink)
            finally:
                # raises the disk error instead of the error that torch made of it
                sink.raise_if_failed()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Renames a temporary file or folder to its final name."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the contents of a file atomically."""
    commit(write_temporary(path, lambda sink: sink.write(data)), path)


def copy_temporary(source: Path, path: Path) -> Path:
    """Copies a file, byte for byte, to the temporary name of `path`."""

    def copy(sink: Sink) -> None:
        with open_regular(source) as file:
            while piece := file.read(4 * 2**20):
                sink.write(piece)

    return write_temporary(path, copy)


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or folder; a folder is renamed first, so that a crash leaves no part of it."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f"{TEMPORARY}{path.name}")
        if path != doomed:
            os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes temporary files left behind by a crash."""
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def _open_lock(path: Path) -> int:
    """Opens or creates a lock file; refuses links, pipes and devices.

    Raises:
        NotRegularFile: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    with contextlib.suppress(FileNotFoundError):
        check_regular(os.lstat(path), path)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        check_regular(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return handle


class Lock:
    """Allows one writer per folder; the system releases the lock when the process dies.

    Uses `flock`. A POSIX record lock would be lost as soon as any code in the process opens and
    closes the file, as a backup of the folder does. Forked data loader workers inherit the lock and
    close it at once, so that a killed run can be restarted while its workers are still exiting.
    """

    _held: dict[str, Lock] = {}  # noqa: RUF012  (per process: folder -> lock)

    def __init__(self, folder: Path) -> None:
        self._key = os.path.realpath(folder)
        if self._key in self._held:
            raise StoreLocked(
                f"{folder} is already open for writing in this process ({os.getpid()}); close() "
                "the other CheckpointStore, or open this one with read_only=True"
            )
        self._handle = _open_lock(folder / ".lock")
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = os.read(self._handle, 32).strip()
            owner = found.decode() if found.isdigit() else "unknown"
            os.close(self._handle)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise  # the file system has no locks
            raise StoreLocked(
                f"{folder} is open for writing in process {owner}; wait for that process or stop "
                "it, choose another directory, or open this one with read_only=True"
            ) from None
        # more links: the file is a hard link to another file
        if os.fstat(self._handle).st_nlink == 1:
            # If the disk is full, the lock works, but the file does not contain the process id.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        self._held[self._key] = self

    def release(self) -> None:
        """Releases the lock; has no effect if already released, or in a forked child."""
        if self._held.get(self._key) is self:
            del self._held[self._key]
            os.close(self._handle)

    @classmethod
    def release_all(cls) -> None:
        """Closes the locks that a forked child inherited; the parent keeps them."""
        for lock in list(cls._held.values()):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.release_all)
