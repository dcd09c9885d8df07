"""`OpenFiles`: keeps the files of a folder open, so that exactly the hashed data is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from fastguard.checkpoints.errors import DamagedFile
from fastguard.records.regular_files import open_regular

_HELD = 200  # open files; many systems limit a process to 1024

Identity = tuple[int, int, int, int]
"""Inode, size, modification time and change time: equal on all clients of a network file system. A
program cannot set the last one back."""


class TouchedFile(DamagedFile):
    """Only the change time differs: the file was linked or unlinked, or its time was set back."""


class OpenFiles:
    """The files of a folder; opening a file again returns the same unchanged file, or raises.

    Up to 200 files stay open; all other files are compared by their identity.

    Args:
        folder: The folder. Links in it are not followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._identities: dict[str, Identity] = {}
        self._held: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        self._names: list[str] = []

    def names(self) -> list[str]:
        """Returns the files of the folder, in the order of `sha256sum *`, as first listed."""
        if not self._names:
            if self.folder.is_symlink():
                raise DamagedFile(f"{self.folder} is a symbolic link, not a folder")
            self._names = sorted(os.listdir(self.folder))
        return self._names

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file at its start.

        Args:
            name: A plain file name, not a path.

        Raises:
            DamagedFile: The file is not the one opened under this name before.
            OSError: The file cannot be opened.
        """
        if Path(name).name != name or name in ("", ".."):
            raise DamagedFile(f"{self.folder} points to {name!r}, outside it")
        file = self._held.get(name)
        if file is not None:
            self._compare(name, file)
            file.seek(0)
            yield file
            return
        with ExitStack() as closing:
            file = closing.enter_context(open_regular(self.folder / name, follow_links=False))
            self._compare(name, file)
            if len(self._held) < _HELD:
                self._held[name] = file
                self._stack.push(closing.pop_all())
            yield file
            self._compare(name, file)

    def identity(self, name: str) -> Identity:
        """Returns the identity of a file opened before, to detect later changes."""
        return self._identities[name]

    def expect(self, identities: Mapping[str, Identity]) -> None:
        """Sets the identities of files that other ranks have hashed."""
        self._identities |= identities

    def forget(self) -> None:
        """Forgets the identities of all files, to read them again; files that are open stay so."""
        self._identities.clear()

    def check_unchanged(self) -> None:
        """Raises a DamagedFile if an open file was written to since it was opened."""
        for name, file in self._held.items():
            self._compare(name, file)

    def _compare(self, name: str, file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        now = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        before = self._identities.setdefault(name, now)
        if before != now:
            kind = TouchedFile if before[:-1] == now[:-1] else DamagedFile
            raise kind(f"{self.folder / name} was changed while it was being read")

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._held.clear()
