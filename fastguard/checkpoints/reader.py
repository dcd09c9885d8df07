"""The reading half of a store: list, verify and load checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastguard.checkpoints import archive, rotation
from fastguard.checkpoints import object_states as state
from fastguard.checkpoints.arguments import joined
from fastguard.checkpoints.entry import Entry
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.folder import Folder
from fastguard.checkpoints.random_state import set_random_state
from fastguard.errors.logger import log

_KINDS = {"min": "smallest", "max": "largest"}
Which = int | Literal["last", "last-clean", "best"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        entry: The metadata of the checkpoint, such as step, epoch, metric and tag.
        state: States and values, by name, that were not restored into an object.
    """

    entry: Entry
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.entry.step

    @property
    def epoch(self) -> int | None:
        return self.entry.epoch


@dataclass(frozen=True, slots=True)
class Check:
    """The result of `verify` for one checkpoint.

    Attributes:
        entry: The updated entry of the checkpoint.
        problem: What is wrong with the file; None if it is intact.
    """

    entry: Entry
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the file is intact and every tensor is finite."""
        return self.problem is None and self.entry.finite


class StoreView:
    """The reading part of `CheckpointStore`, which changes only the verdicts in the manifest."""

    directory: Path
    _folder: Folder

    def list(self) -> tuple[Entry, ...]:
        """Returns the checkpoints, oldest first."""
        return self._folder.manifest.entries

    def replaced(self) -> tuple[Entry, ...]:
        """Returns the checkpoints set aside by the latest rollback, oldest first."""
        return self._folder.manifest.replaced

    def unreadable(self) -> dict[str, str]:
        """Returns, by name, why files could not be read when the manifest was rebuilt from them."""
        return dict(self._folder.unreadable)

    def last(self) -> Entry | None:
        """Returns the newest checkpoint, clean or not."""
        return next(reversed(self.list()), None)

    def last_clean(self) -> Entry | None:
        """Returns the newest checkpoint that is finite and whose file is known to be intact."""
        return self._last_clean()

    def best(self) -> Entry | None:
        """Returns the clean checkpoint with the best metric."""
        return rotation.best(self.list(), self._folder.manifest.mode)

    def verify(self, which: Which | Literal["all"] = "all") -> tuple[Check, ...]:
        """Reads checkpoints from disk, compares checksums, and checks every tensor.

        The verdicts are stored in the manifest, unless the store is read-only.

        Args:
            which: A checkpoint as in `load`, or `"all"`.

        Returns:
            One `Check` per checkpoint.
        """
        entries = self.list() if which == "all" else (self._find(which),)
        checks = [Check(*self._folder.verify(entry)) for entry in entries]
        # a writer may have removed checkpoints meanwhile
        still_there = {entry.file for entry in self.list()}
        return tuple(check for check in checks if check.entry.file in still_there)

    def load(
        self,
        which: Which = "last",
        objects: Mapping[str, Any] | None = None,
        /,
        *,
        rng: bool = True,
        **named: Any,
    ) -> Checkpoint:
        """Loads a checkpoint after comparing its checksum; executes no code from the file.

        Args:
            which: A step, `"last"`, `"last-clean"` or `"best"` (the clean checkpoint with the
                smallest metric, or the largest if the store has `mode="max"`). `"last-clean"` skips
                damaged and unreadable files and logs an error for each; the other choices raise.
            objects: Objects to restore, for names that are not Python identifiers.
            rng: Whether to restore the global random states if objects are given.
            **named: Objects to restore, as in `save`; states without an object are returned in
                `state`.

        Returns:
            The checkpoint: its entry and the states that were not restored.

        Raises:
            CheckpointError: There is no such checkpoint, or the checkpoint lacks one of the names.
            DamagedFile: The file differs from what was written.
            OSError: The file cannot be read.
        """
        everything = joined(objects, named)
        entry, payload = self._read(which, everything)
        states: dict[str, Any] = {**payload["objects"], **payload["data"]}
        if everything:
            peers = self._folder.peers  # if loading fails on one rank, it fails on all
            peers.together(lambda: state.check_restorable(everything, states))
            peers.together(lambda: state.restore(everything, states))
            if rng:
                peers.together(lambda: set_random_state(payload["rng"]))
        log.info("loaded %s", entry)
        return Checkpoint(entry, {k: v for k, v in states.items() if k not in everything})

    def _last_clean(self, damaged: Collection[str] = ()) -> Entry | None:
        clean = (e for e in reversed(self.list()) if e.clean and e.file not in damaged)
        return next(clean, None)

    def _find(self, which: Which, damaged: Collection[str] = ()) -> Entry:
        """Returns the entry for `which`; `damaged` files do not count as clean."""
        found = {
            "last": self.last,
            "last-clean": lambda: self._last_clean(damaged),
            "best": self.best,
        }
        if isinstance(which, int) and not isinstance(which, bool):
            entry = next((e for e in reversed(self.list()) if e.step == which), None)
        elif which in found:
            entry = found[which]()
        else:
            raise ValueError(
                f'{which!r} is not a checkpoint; use a step, "last", "last-clean", "best"'
            )
        if entry is None:
            steps = ", ".join(str(e.step) for e in self.list()) or "none"
            mode = self._folder.manifest.mode
            kind = _KINDS.get(mode, mode)
            meaning = (
                f'; "best" is the clean one with the {kind} metric (mode="{mode}") passed to '
                "save(metric=...)"
            )
            raise CheckpointError(
                f"{self.directory} has no checkpoint {which!r}; its steps are {steps}"
                f"{meaning if which == 'best' else ''}"
            )
        return entry

    def _read(self, which: Which, objects: Mapping[str, Any]) -> tuple[Entry, dict[str, Any]]:
        damaged: set[str] = set()
        while True:
            entry = self._find(which, damaged)
            try:
                path = self.directory / entry.file
                return entry, archive.read(path, entry.sha256, objects, self._folder.peers)
            except (DamagedFile, OSError) as error:
                if which != "last-clean":
                    if isinstance(error, OSError):
                        raise
                    raise DamagedFile(f'{error}; load "last-clean" instead') from None
                log.error("skipping a checkpoint: %s", error)
                damaged.add(entry.file)
                if self._folder.is_open_for_writing:
                    self._folder.update(replace(entry, verified=False))
