"""Lists and reads the files of one run: the current `records.jsonl`, and full files beside it.

A writer renames a full file to `records.1.jsonl`, `records.2.jsonl`, ... and starts a new one.
Readers may run at the same time: they see all records up to some moment, in order, without gaps.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from fastguard.errors.logger import log
from fastguard.records.regular_files import open_regular

Identity = tuple[int, int]
"""Device and inode, which identify a file under any name."""

_AHEAD = 32
"""Number of files to open in advance, since the writer may delete them in the meantime."""

_TRIES = 20
"""Maximum number of times to list a folder again if a rotation interferes."""


def rotated_files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the full files of a run, oldest first, without the current one."""
    path = Path(path)
    start, end = f"{path.stem}.", path.suffix
    try:
        names = os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        number = name[len(start) : len(name) - len(end)]
        if name.startswith(start) and name.endswith(end) and _is_number(number):
            if not os.path.isdir(path.with_name(name)):
                found.append((int(number), name))
    return [path.with_name(name) for _, name in sorted(found)]


def full_file(path: Path, number: int) -> Path:
    """Returns the path of the full file with this number; `path` is the current file."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def number_of(path: Path, full: Path) -> int:
    """Returns the number of a full file; `path` is the current file."""
    return int(full.name[len(path.stem) + 1 : len(full.name) - len(path.suffix)])


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii()


def identity_of(found: os.stat_result) -> Identity:
    """Returns the identity of the file that `os.stat` or `os.fstat` found."""
    return found.st_dev, found.st_ino


def open_at(path: Path) -> int | None:
    """Opens a regular file for reading and returns its descriptor; None if it does not exist.

    Raises:
        OSError: The file cannot be read, or is a pipe, a device or a folder.
    """
    file = _opened(path)
    if file is None:
        return None
    with file:
        return os.dup(file.fileno())


def identity_at(path: Path) -> Identity | None:
    """Returns the identity of the file that now has this name; None if there is none."""
    try:
        return identity_of(os.stat(path))
    except FileNotFoundError:
        return None


def index_of(identity: Identity, files: Sequence[Path]) -> int | None:
    """Returns the index of the file with this identity, or None."""
    for i in reversed(range(len(files))):  # from the newest, which is the most frequent case
        if identity_at(files[i]) == identity:
            return i
    return None


def split_at_current(
    path: Path, current: Identity | None, newest: Path | None
) -> tuple[list[Path], list[Path]]:
    """Returns the full files that are older and newer than a file opened as the current one.

    Args:
        path: The name of the current file.
        current: The identity of the opened file; None if there was none.
        newest: The newest full file before the current file was opened; used if that file has been
            deleted.
    """
    i, listed = None, rotated_files(path)
    for _ in range(_TRIES):
        # A listing may miss a file that is being renamed. The listing is complete if the opened
        # file still has its name, or if the listing contains that file and all later numbers.
        if current is None or identity_at(path) == current:
            return listed, []
        i = index_of(current, listed)
        if i is not None and _are_consecutive(path, listed[i:]):
            break
        listed = rotated_files(path)
    if i is not None:
        return listed[:i], listed[i + 1 :]
    # The opened file has been deleted, or replaced by hand.
    first = listed.index(newest) + 1 if newest in listed else 0
    return listed[:first], listed[first:]


def _are_consecutive(path: Path, files: Sequence[Path]) -> bool:
    """Whether the numbers of these full files have no gap."""
    numbers = [number_of(path, file) for file in files]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def open_run(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yields the files of a run, oldest first, as path and open file.

    The writer may rotate meanwhile; the files contain all records up to about the time of the call.
    A warning is logged if full files were deleted before they could be read.

    Raises:
        FileNotFoundError: Neither this file nor a full file exists.
        OSError: A file cannot be read, or is a pipe, a device or a folder.
    """
    before = rotated_files(path)
    with ExitStack() as stack:
        current = _opened(path)
        if current is not None:
            stack.callback(current.close)
        found = None if current is None else identity_of(os.fstat(current.fileno()))
        older, newer = split_at_current(path, found, before[-1] if before else None)
        if current is None and not older:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        yield from _each(path, older)
        if current is not None:
            yield path, current
        yield from _each(path, newer)


def _each(path: Path, files: Sequence[Path]) -> Iterator[tuple[Path, BinaryIO]]:
    waiting = deque(files)
    ahead: deque[tuple[Path, BinaryIO]] = deque()
    begun, deleted = False, 0
    try:
        while waiting or ahead:
            while waiting and len(ahead) < _AHEAD:
                name = waiting.popleft()
                file = _opened(name)
                if file is not None:
                    ahead.append((name, file))
                elif begun or ahead:  # there is a gap, while a writer deletes only the oldest files
                    deleted += 1
            if ahead:
                begun = True
                name, file = ahead.popleft()
                with file:
                    yield name, file
    finally:
        for _, file in ahead:
            file.close()
        if deleted:
            they = "rotated file was" if deleted == 1 else "rotated files were"
            log.warning("%s: %d %s deleted before being read", path, deleted, they)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open_regular(path)
    except FileNotFoundError:  # the file was deleted since the listing, or is not created yet
        return None
