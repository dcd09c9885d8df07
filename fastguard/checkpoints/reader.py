"""Looking at a store: what it holds, whether it is whole, and loading from it."""

from __future__ import annotations

import logging
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

log = logging.getLogger("fastguard")

_KINDS = {"min": "smallest", "max": "largest"}
Which = int | Literal["last", "last-clean", "best"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was loaded.

    Attributes:
        entry: What the manifest says of it: step, epoch, metric, tag, and the rest.
        state: By name, the states and values that were not given to an object.
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
    """What `verify` found out about one checkpoint.

    Attributes:
        entry: Its entry, brought up to date.
        problem: What is wrong with the file; None if it is whole.
    """

    entry: Entry
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the file is whole and every tensor in it finite."""
        return self.problem is None and self.entry.finite


class StoreView:
    """The half of `CheckpointStore` that changes nothing but verdicts."""

    directory: Path
    _folder: Folder

    def list(self) -> tuple[Entry, ...]:
        """The checkpoints, oldest first."""
        return self._folder.manifest.entries

    def replaced(self) -> tuple[Entry, ...]:
        """The checkpoints that the latest rollback put aside, oldest first."""
        return self._folder.manifest.replaced

    def last(self) -> Entry | None:
        """The newest checkpoint, clean or not."""
        return next(reversed(self.list()), None)

    def last_clean(self) -> Entry | None:
        """The newest checkpoint of finite tensors whose file is known to be whole."""
        return self._last_clean()

    def best(self) -> Entry | None:
        """The clean checkpoint with the best metric."""
        return rotation.best(self.list(), self._folder.manifest.mode)

    def verify(self, which: Which | Literal["all"] = "all") -> tuple[Check, ...]:
        """Reads checkpoints back from the disk, compares checksums, and looks at every tensor.

        The verdicts go into the manifest, unless the store is read-only.

        Args:
            which: One of them as in `load`, or `"all"`.
        """
        entries = self.list() if which == "all" else (self._find(which),)
        checks = [Check(*self._folder.verify(entry)) for entry in entries]
        still_there = {entry.file for entry in self.list()}  # a writer may have rotated meanwhile
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
        """Loads a checkpoint, after comparing its checksum; nothing of it is executed.

        Args:
            which: A step, `"last"`, `"last-clean"` or `"best"` (by `mode`: the clean one with the
                smallest metric, unless the store was opened with `mode="max"`). Files that are
                damaged or cannot be read are passed over by `"last-clean"`, loudly, and are an
                error otherwise.
            objects: What to restore by name, for names that are no Python words.
            rng: Whether the global random streams continue where they were, if objects are given.
            **named: What to restore, as in `save`; a name without an object stays in the result's
                `state`.

        Returns:
            Where it stood, and the states that no object took.

        Raises:
            CheckpointError: There is no such checkpoint, or it lacks one of the names.
            DamagedFile: It is not what was written.
            OSError: It cannot be read.
        """
        everything = joined(objects, named)
        entry, payload = self._read(which, everything)
        states: dict[str, Any] = {**payload["objects"], **payload["data"]}
        if everything:
            peers = self._folder.peers  # all of them load it, or none
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
        """The entry that is meant; `damaged` files are no clean ones."""
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
                f'{which!r} is no checkpoint; use a step, "last", "last-clean", "best"'
            )
        if entry is None:
            steps = ", ".join(str(e.step) for e in self.list()) or "none"
            mode = self._folder.manifest.mode
            kind = _KINDS.get(mode, mode)
            meaning = (
                f'; "best" is the clean one with the {kind} metric (mode="{mode}"), given to '
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
                log.error("passing over a checkpoint: %s", error)
                damaged.add(entry.file)
                if self._folder.is_open_for_writing:
                    self._folder.update(replace(entry, verified=False))
