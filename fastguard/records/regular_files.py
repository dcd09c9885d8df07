"""Opens regular files only, since reading from a pipe may block, and a device may never end."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


class NotRegularFile(OSError):
    """A path that should be a regular file is a pipe, a device, a socket or a link."""


def open_regular(
    path: str | os.PathLike[str], *, follow_links: bool = True, buffering: int = -1
) -> BinaryIO:
    """Opens a regular file for binary reading; never blocks or reads from a device.

    Args:
        path: The file.
        follow_links: Whether the path may be a symbolic link to a regular file. Use True for paths
            from the user, and False for paths found in untrusted files or folders.
        buffering: As in `open`.

    Returns:
        The file. Errors while reading it have the path as their `filename`.

    Raises:
        NotRegularFile: The path is a pipe, a device, a socket, a link or a file of `/proc`;
            `strerror` says which.
        IsADirectoryError: The path is a folder.
        OSError: The file cannot be opened.

    Example:
        >>> open_regular(os.devnull)
        Traceback (most recent call last):
        fastguard.records.regular_files.NotRegularFile: [Errno 22] is a device, not a regular ...
    """
    # The check comes before opening, since opening has side effects on some devices (tapes rewind,
    # watchdogs start).
    check_regular(os.stat(path, follow_symlinks=follow_links), path)
    # O_NONBLOCK prevents waiting if a pipe has replaced the file since the check.
    flags = os.O_RDONLY | _flags("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY")
    handle = os.open(path, flags if follow_links else flags | _flags("O_NOFOLLOW"))
    try:
        check_regular(os.fstat(handle), path)
        _check_size(handle, path)
        raw = _NamedFile(handle, os.fspath(path))
    except BaseException:
        os.close(handle)
        raise
    if not buffering:
        return raw  # type: ignore[return-value]
    return io.BufferedReader(raw, io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering)


class _NamedFile(io.FileIO):
    """An unbuffered file whose read errors name it, unlike those of `io.FileIO`."""

    def __init__(self, handle: int, path: str) -> None:
        super().__init__(handle, "rb")
        self._path = path

    def readinto(self, buffer: Any) -> int:
        return self._read(super().readinto, buffer)

    def read(self, size: int | None = -1) -> bytes:
        return self._read(super().read, size)

    def readall(self) -> bytes:
        return self._read(super().readall)

    def _read(self, read: Callable[..., T | None], *arguments: Any) -> T:
        try:
            found = read(*arguments)
        except OSError as error:
            error.filename = self._path
            raise
        if found is None:  # O_NONBLOCK: a read would wait
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), self._path)
        return found


def check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raises an error unless `os.stat` found a regular file; see `open_regular`."""
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "special")
        raise NotRegularFile(errno.EINVAL, f"is {what}, not a regular file", os.fspath(path))


def _check_size(handle: int, path: str | os.PathLike[str]) -> None:
    """Raises for a file without a size that is not empty.

    The files of `/proc` are regular files of size 0. Reading one may fail, wait or never end.
    """
    if os.fstat(handle).st_size or not hasattr(os, "pread"):
        return
    try:
        is_empty = not os.pread(handle, 1, 0) or os.fstat(handle).st_size > 0  # or was written to
    except OSError:
        is_empty = False
    if not is_empty:
        what = "is a file of the system, such as those in /proc, not a regular file"
        raise NotRegularFile(errno.EINVAL, what, os.fspath(path))


def _flags(*names: str) -> int:
    """Combines the `os.open` flags that this system has."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


def folder_error(path: str | os.PathLike[str]) -> IsADirectoryError:
    """Returns the error for a folder given where a file is expected."""
    return IsADirectoryError(
        f"{os.fspath(path)!r} is a folder; name a file in it, such as "
        f"{str(Path(path) / 'records.jsonl')!r}"
    )
