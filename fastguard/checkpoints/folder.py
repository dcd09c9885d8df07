"""The folder of a store on disk: its manifest and the changes made to it.

Every change is a single rename of `manifest.json`. A crash between that rename and the clean-up can
leave extra files. The next writer removes temporary files and files already marked for removal, and
adds complete checkpoints that are missing from the manifest, after verifying them.

With several ranks, rank 0 opens the folder, holds the lock and writes the manifest. The other ranks
get the manifest from rank 0, since on a network file system they may see an older version.
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastguard.checkpoints import archive, manifest, names
from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.entry import Entry, from_json
from fastguard.checkpoints.errors import CheckpointError, StoreLocked
from fastguard.checkpoints.manifest import Manifest
from fastguard.checkpoints.reading.file_report import FileReport, not_ignored
from fastguard.errors.logger import log
from fastguard.ranks.lockstep import Peers
from fastguard.records.regular_files import NotRegularFile

Rotation = Callable[[Sequence[Entry]], tuple[Entry, ...]]


def is_store(path: Path) -> bool:
    """Whether a folder belongs to a `CheckpointStore`."""
    return manifest.is_ours(path) or any(_files(path))


def is_checkpoint(path: Path) -> bool:
    """Whether a file or folder is named like a checkpoint of a store."""
    return names.parse(path.name) is not None


def _files(path: Path) -> Iterator[tuple[int, str]]:
    """Yields `(serial, name)` of the checkpoints in a folder, oldest first."""
    found = ((names.parse(name), name) for name in os.listdir(path))
    yield from sorted((parsed.serial, name) for parsed, name in found if parsed is not None)


def _size_of_file(path: Path) -> int | None:
    """Returns the size of a regular file in bytes; None for anything else."""
    found = path.lstat()
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class Folder:
    """A folder opened for reading or for writing.

    Args:
        path: The folder; created if opened for writing.
        read_only: Take no lock and change nothing.
        mode: `"min"` or `"max"`: whether the smallest or the largest metric is best; None keeps the
            stored mode.
        ignore: Patterns of tensors whose NaN and Inf do not count; None keeps the stored ones.
        peers: The ranks that share the folder. Every rank calls every method that changes it.

    Raises:
        StoreLocked: Another writer has the folder open.
        CheckpointError: The folder cannot be used, or its manifest is from a newer version or
            another tool.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool,
        mode: str | None,
        ignore: Sequence[str] | None,
        peers: Peers,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.peers = peers
        self._pid = os.getpid()
        self._closed = False
        # by file name, why a file that the manifest lacks cannot be read
        self.unreadable: dict[str, str] = {}
        self._release: Callable[[], object] | None = None
        self._manifest = peers.first(
            self._open_read_only if read_only else lambda: self._open(mode, ignore)
        )

    @property
    def manifest(self) -> Manifest:
        """The contents of the folder.

        A single read-only process sees changes that a writer makes. Several read-only ranks see the
        contents at the time of opening.
        """
        if self.read_only and self.peers.size == 1:
            self._manifest = manifest.read(self.path) or self._manifest
        return self._manifest

    def close(self) -> None:
        """Releases the lock so that another process can write."""
        self._closed = True
        if self._release is not None:
            self._release()

    # Changes the folder.

    def add(self, entry: Entry, payload: Mapping[str, Any], staying: Rotation) -> Entry:
        """Writes a checkpoint, reads it back, and removes checkpoints that rotation drops.

        Args:
            entry: The metadata known before writing.
            payload: The data to write.
            staying: Selects the entries to keep: `(entries) -> entries`.

        Raises:
            OSError: The disk is full, read-only or broken. The folder is unchanged, unless the new
                manifest is in place and only flushing it failed.
            DamagedFile: The data read back differ from what was written.
        """
        self.check_open()
        path = self.path / entry.file
        temporary = archive.write(path, payload, self.peers)
        try:
            entry = self._with_report(entry, archive.report_on(temporary, self.peers))
            self.peers.first(lambda: files.commit(temporary, path))
            entries = staying((*self._manifest.entries, entry))
            self._change(replace(self._manifest, entries=entries, next_serial=entry.serial + 1))
        except BaseException:
            if self.peers.is_first:
                self._remove_unlisted(temporary, path)
            raise
        return entry

    def _remove_unlisted(self, *leftovers: Path) -> None:
        """Removes files left by a save, except those listed by the manifest on disk.

        An interrupt may arrive after the new manifest is written and while old checkpoints are
        being removed; the new checkpoint may then be the only one left.
        """
        for path in leftovers:
            with contextlib.suppress(CheckpointError, OSError):
                known = manifest.read(self.path)
                if known is None or path.name not in known.files:
                    files.remove(path)

    def verify(self, entry: Entry) -> tuple[Entry, str | None]:
        """Reads a whole checkpoint from disk.

        Returns:
            The entry with an updated verdict, and the problem found, or None.
        """
        problem, found = self._compare(entry)
        updated = (
            replace(entry, verified=False) if found is None else self._with_report(entry, found)
        )
        if updated != entry and self.is_open_for_writing:
            self.update(updated)
        return updated, problem

    def _compare(self, entry: Entry) -> tuple[str | None, FileReport | None]:
        path = self.path / entry.file
        try:
            size = self.peers.first(lambda: _size_of_file(path))
            if size is not None and size < entry.size:
                return f"{path} is truncated: {size} of {entry.size} bytes", None
            found = archive.report_on(path, self.peers, crc32=False)
        except FileNotFoundError:
            return f"{path} is missing", None
        except (CheckpointError, OSError) as error:
            return str(error), None
        if found.sha256 != entry.sha256:
            return (
                f"{path} changed on disk after it was written: its SHA-256 is "
                f"{found.sha256[:16]}..., the manifest has {entry.sha256[:16]}...",
                None,
            )
        return None, found

    def update(self, entry: Entry) -> None:
        """Replaces the entry for a file."""
        after = self._manifest.with_entry(entry)
        try:
            self._change(after)
        except OSError as error:
            log.warning("cannot write the manifest of %s: %s", self.path, error)
            self._manifest = after  # so that at least this process knows the result

    def roll_back(self, target: Entry) -> tuple[Entry, ...]:
        """Sets aside everything saved after `target`, making `target` the last checkpoint.

        Returns:
            The entries set aside. Their files keep `.replaced` appended to their names until the
            next rollback.
        """
        self.check_open()
        before = self._manifest
        newer = tuple(e for e in before.entries if e.serial > target.serial)
        if not newer:
            return ()
        outdated = tuple(e.file + names.REPLACED for e in before.replaced)
        self._change(
            replace(
                before,
                entries=tuple(e for e in before.entries if e.serial <= target.serial),
                replaced=newer,
                removing=(*before.removing, *outdated),
            )
        )
        return newer

    def _change(self, after: Manifest) -> None:
        """Writes the manifest `after`, then renames and removes files to match it."""
        try:
            self.peers.first(lambda: self._apply(after))
        finally:
            self._manifest = self.peers.first(lambda: self._manifest)

    def _apply(self, after: Manifest) -> None:
        before = self._manifest
        staying = {e.file for e in (*after.entries, *after.replaced)}
        dropped = [e.file for e in before.entries if e.file not in staying]
        after = replace(after, removing=(*after.removing, *dropped))
        try:
            after.write(self.path)
            self._manifest = after
            self._match_files_to_manifest()
        except BaseException:
            # The manifest on disk may or may not have been replaced, so read it. In that case
            # `after` stays in memory, as it may contain verdicts that could not be written earlier.
            with contextlib.suppress(CheckpointError, OSError):
                known = manifest.read(self.path)
                if known is not None and known.files == after.files:
                    self._manifest = after
            raise

    def _match_files_to_manifest(self) -> None:
        """Renames and removes files to match the manifest. After a crash, the next writer does
        so.
        """
        for entry in self._manifest.replaced:
            path = self.path / entry.file
            try:
                if os.path.lexists(path):
                    os.replace(path, path.with_name(path.name + names.REPLACED))
            except OSError as error:
                log.warning("cannot rename %s: %s", path, error)
        if not self._manifest.removing:
            return
        stuck = []
        for name in self._manifest.removing:
            try:
                files.remove(self.path / name)
            except OSError as error:
                stuck.append(name)
                log.warning("cannot remove %s: %s", self.path / name, error)
        self._manifest = replace(self._manifest, removing=tuple(stuck))
        # Writes the manifest again without the removed names, so that a file that a user later
        # restores under such a name is not removed.
        with contextlib.suppress(OSError):
            self._manifest.write(self.path)

    # Opens the folder.

    def _open_read_only(self) -> Manifest:
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory, so it has no checkpoints")
        return self._read()

    def _open(self, mode: str | None, ignore: Sequence[str] | None) -> Manifest:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if manifest.is_foreign(self.path):
                raise CheckpointError(
                    f"{self.path / manifest.NAME} is not the manifest of a CheckpointStore; choose "
                    "another directory, or move the file away"
                )
            lock = files.Lock(self.path)
        except NotRegularFile as error:
            raise CheckpointError(
                f"{error.filename} {error.strerror}; nothing was changed. Remove this file if you "
                "trust the folder, or open the store with read_only=True"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.path}: {error.strerror}; choose another directory, or open "
                "this one with read_only=True"
            ) from None
        self._release = weakref.finalize(self, lock.release)
        try:
            self._manifest = self._read()
            self._clean_up_after_crash()
            settings = replace(
                self._manifest,
                mode=mode or self._manifest.mode,
                ignore=self._manifest.ignore if ignore is None else tuple(ignore),
            )
            if settings != self._manifest or not (self.path / manifest.NAME).exists():
                self._apply(settings)
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"cannot open {self.path} for writing: {error}; free some space, choose another "
                "directory, or open this one with read_only=True"
            ) from error
        except BaseException:
            self.close()
            raise
        return self._manifest

    def _read(self) -> Manifest:
        known = manifest.read(self.path)
        if known is not None:
            return known
        found = Manifest()
        for serial, name in _files(self.path):
            found = self._with_found(found, serial, name)
        damaged = self.path / manifest.NAME
        if found.entries or damaged.exists():
            n = len(found.entries)
            word = "checkpoint" if n == 1 else "checkpoints"
            log.warning("%s was lost or damaged; rebuilt from %d %s", damaged, n, word)
        if not self.read_only and damaged.exists():
            os.replace(damaged, damaged.with_name(damaged.name + ".damaged"))
        return found

    def _with_found(self, found: Manifest, serial: int, name: str) -> Manifest:
        """Returns the manifest with an entry added for a checkpoint that it does not list."""
        try:
            seen = archive.report_on(self.path / name, Peers())
            entry = from_json({**(seen.header or {}), "serial": serial, "file": name})
        except (CheckpointError, OSError, TypeError, ValueError) as error:
            self.unreadable[name] = str(error)
            log.warning("%s is ignored, since it cannot be read: %s", name, error)
            return replace(found, next_serial=max(found.next_serial, serial + 1))
        entry = self._with_report(entry, seen, found.ignore)
        entries = sorted((*found.entries, entry), key=lambda e: e.serial)
        return replace(
            found, entries=tuple(entries), next_serial=max(found.next_serial, serial + 1)
        )

    def _clean_up_after_crash(self) -> None:
        files.remove_temporaries(self.path)
        self._match_files_to_manifest()
        found = self._manifest
        known = {e.file for e in (*found.entries, *found.replaced)}
        known |= {*self.unreadable, *found.removing}
        for serial, name in _files(self.path):
            if name not in known:
                found = self._with_found(found, serial, name)
        if found != self._manifest:
            self._apply(found)

    @property
    def is_open_for_writing(self) -> bool:
        """Whether this process may change the folder; a forked child does not hold its lock."""
        return not self.read_only and not self._closed and os.getpid() == self._pid

    def check_open(self) -> None:
        """Raises a CheckpointError if the folder may not be changed."""
        if self.read_only:
            raise CheckpointError(f"{self.path} was opened with read_only=True")
        if self._closed:
            raise CheckpointError(f"the store at {self.path} is closed")
        if os.getpid() != self._pid:
            raise StoreLocked(
                f"{self.path} was opened for writing in process {self._pid}, and this process "
                f"({os.getpid()}) is a fork of that process whose saves would be lost; save in "
                f"process {self._pid}, or open a CheckpointStore in another directory here"
            )

    def _with_report(
        self, entry: Entry, seen: FileReport, ignore: Sequence[str] | None = None
    ) -> Entry:
        """Returns the entry, updated from the report of reading its file."""
        return replace(
            entry,
            n_tensors=len(seen.tensors),
            bad=not_ignored(seen.bad, self._manifest.ignore if ignore is None else ignore),
            sha256=seen.sha256,
            size=seen.size,
            verified=True,
        )
