"""Opens regular files only, since reading from a pipe may block, and a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

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

    Raises:
        NotRegularFile: The path is a pipe, a device, a socket or a link; `strerror` says which.
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
        return open(handle, "rb", buffering=buffering)
    except BaseException:
        os.close(handle)
        raise


def check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raises an error unless `os.stat` found a regular file; see `open_regular`."""
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "special")
        raise NotRegularFile(errno.EINVAL, f"is {what}, not a regular file", os.fspath(path))


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
