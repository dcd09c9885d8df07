"""Opening what must be a regular file: a pipe makes a reader wait, a device never ends."""

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
    """A pipe, a device, a socket or a link where a regular file is expected."""


def open_regular(
    path: str | os.PathLike[str], *, follow_links: bool = True, buffering: int = -1
) -> BinaryIO:
    """Opens a regular file for reading, in binary; waits for nothing and reads from no device.

    Args:
        path: The file.
        follow_links: Whether the name may be a symbolic link to a regular file: yes for what a user
            names, no for what a file or folder from elsewhere names.
        buffering: As in `open`.

    Raises:
        NotRegularFile: It is something else; `strerror` says what.
        IsADirectoryError, OSError: It is a folder, or cannot be opened.

    Example:
        >>> open_regular(os.devnull)
        Traceback (most recent call last):
        fastguard.records.regular_files.NotRegularFile: [Errno 22] is a device, not a regular ...
    """
    # Before it is opened: opening some devices does something (a tape rewinds, a watchdog starts).
    check_regular(os.stat(path, follow_symlinks=follow_links), path)
    # O_NONBLOCK: a pipe that took its place meanwhile is not waited for.
    flags = os.O_RDONLY | _flags("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY")
    handle = os.open(path, flags if follow_links else flags | _flags("O_NOFOLLOW"))
    try:
        check_regular(os.fstat(handle), path)
        return open(handle, "rb", buffering=buffering)
    except BaseException:
        os.close(handle)
        raise


def check_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raises if `os.stat` found anything but a regular file; as `open_regular`."""
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "special")
        raise NotRegularFile(errno.EINVAL, f"is {what}, not a regular file", os.fspath(path))


def _flags(*names: str) -> int:
    """The flags of `os.open` that this system has."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


def folder_error(path: str | os.PathLike[str]) -> IsADirectoryError:
    return IsADirectoryError(
        f"{os.fspath(path)!r} is a folder; name a file in it, such as "
        f"{str(Path(path) / 'records.jsonl')!r}"
    )
