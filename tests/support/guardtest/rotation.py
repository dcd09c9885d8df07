"""A writer that rotates at critical moments, just before or after a reader lists the folder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import fastguard.records.rotated_files as listing


@dataclass(frozen=True)
class Rotation:
    """Rotates around one of the moments at which a reader lists the rotated files.

    Attributes:
        look: The number of the listing, from 1.
        before, after: Number of rotations right before and right after it.
        begins: Whether the new file exists immediately.
    """

    look: int
    before: int
    after: int
    begins: bool

    def __str__(self) -> str:
        new = "" if self.begins else "-no-new-file"
        return f"look{self.look}-{self.before}before-{self.after}after{new}"

    def comes(self, monkeypatch: pytest.MonkeyPatch, path: Path, *modules: ModuleType) -> None:
        """Patches `rotated_files` in these modules too; each new file contains the next number."""
        real, looks = listing.rotated_files, itertools.count(1)

        def looked(name: Path) -> list[Path]:
            now = next(looks) == self.look
            self._rotate(real, path, self.before if now else 0)
            found = real(name)
            self._rotate(real, path, self.after if now else 0)
            return found

        for module in (listing, *modules):
            monkeypatch.setattr(module, "rotated_files", looked)

    def _rotate(self, real: object, path: Path, times: int) -> None:
        for i in range(times):
            number = self.last(path) + 1
            path.rename(path.with_name(f"{path.stem}.{len(real(path)) + 1}{path.suffix}"))
            if self.begins or i < times - 1:
                path.write_text(self.line(number))

    @staticmethod
    def line(number: int) -> str:
        """The content of a file; can be overridden."""
        return f"{number}\n"

    @staticmethod
    def last(path: Path) -> int:
        """The highest number in all files."""
        files = path.parent.glob(f"{path.stem}*{path.suffix}")
        return max(int(word) for file in files for word in file.read_text().split())


ROTATIONS = [
    Rotation(look, before, after, begins)
    for look in (1, 2, 3)
    for before, after in ((1, 0), (0, 1), (2, 0), (0, 2), (1, 1))
    for begins in (True, False)
    if begins or (before, after) != (1, 1)
]
