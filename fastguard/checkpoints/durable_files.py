"""Writing so that a crash at any moment leaves either the old file or the new one.

The order is always the same: a temporary name in the same folder, flush and fsync, rename, fsync of
the folder. What a crash leaves behind begins with `TEMPORARY`, and the next writer removes it.

No link is followed and nothing that exists is opened for writing: a folder may come from elsewhere,
with links under the names that are written to.
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
except ImportError:  # Windows: one process at a time is then up to the user
    fcntl = None

TEMPORARY = ".tmp-"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


class Sink:
    """A file for `torch.save`, whose C++ writer turns errors of the disk into its own assertions.

    The first `OSError` is kept for `raise_if_failed`; what is written after it goes nowhere.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self._error is None:
            try:
                done += self._file.write(view[done:])
            except OSError as error:
                self._error = error
        return len(view)

    def flush(self) -> None:
        pass

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error


def write_temporary(path: Path, write: Callable[[Sink], object]) -> Path:
    """Writes what shall become `path` under a temporary name, down to the disk.

    Returns:
        The temporary file: `commit` it, or unlink it.

    Raises:
        OSError: The disk is full, read-only or broken; nothing is left behind. Or there is
            something under that name that no crash left: it stays.
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
                sink.raise_if_failed()  # the cause, rather than what torch makes of it
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Gives a temporary file, or folder, its name."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the contents of a file."""
    commit(write_temporary(path, lambda sink: sink.write(data)), path)


def copy_temporary(source: Path, path: Path) -> Path:
    """Copies a file, byte for byte, to the temporary name of `path`."""

    def copy(sink: Sink) -> None:
        with open_regular(source) as file:
            while piece := file.read(4 * 2**20):
                sink.write(piece)

    return write_temporary(path, copy)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder; a crash leaves no half of a folder under its name."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f"{TEMPORARY}{path.name}")
        if path != doomed:
            os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what a crash left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def _open_lock(path: Path) -> int:
    """Opens the file of a lock, or makes it; never what a link points to, never a pipe or device.

    Raises:
        NotRegularFile: It is none.
        OSError: It cannot be opened.
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
    """One writer a folder, by a lock that the system gives back when the process dies.

    Of `flock`: a POSIX record lock is lost as soon as anything in the process opens the file and
    closes it again, as a backup of the folder does. Forked workers of a data loader inherit it, so
    they close it first of all: a run that was killed can be restarted while they are still dying.
    """

    _held: dict[str, Lock] = {}  # noqa: RUF012  (one for the process: folder -> its lock)

    def __init__(self, folder: Path) -> None:
        self._key = os.path.realpath(folder)
        if self._key in self._held:
            raise StoreLocked(
                f"{folder} is open for writing in this process ({os.getpid()}) already; close() "
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
                raise  # a file system without locks
            raise StoreLocked(
                f"{folder} is open for writing in process {owner}; wait for it or stop it, "
                "choose another directory, or open this one with read_only=True"
            ) from None
        if os.fstat(self._handle).st_nlink == 1:  # else it is another file as well
            with contextlib.suppress(OSError):  # on a full disk the lock holds without a name on it
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        self._held[self._key] = self

    def release(self) -> None:
        """Lets the next writer in; harmless if done before, or in a forked child."""
        if self._held.get(self._key) is self:
            del self._held[self._key]
            os.close(self._handle)

    @classmethod
    def release_all(cls) -> None:
        """Closes what a forked child has inherited; its parent's locks hold on."""
        for lock in list(cls._held.values()):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.release_all)
