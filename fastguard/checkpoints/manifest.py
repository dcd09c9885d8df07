"""`manifest.json`: the contents of a store and the metadata of each checkpoint.

The manifest contains its own SHA-256, so damage is detected. A damaged or lost manifest is rebuilt
from the checkpoints, each of which contains a copy of its entry (`Entry.header`). A manifest from a
newer version is never changed.

The checksum is not a signature: anyone can write a manifest with a valid one. Every value is
therefore checked before use; in particular, each file name must have the form that the store
assigns (`names.parse`), so that it cannot be a path. If the checksum is valid but these checks
fail, the manifest was not damaged by a disk, so it is neither used nor replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastguard.checkpoints import names
from fastguard.checkpoints.durable_files import write_atomically
from fastguard.checkpoints.entry import (
    Entry,
    checked,
    count,
    from_json,
    plain_json,
    text,
    texts,
    to_json,
)
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.errors.checked_numbers import is_integer
from fastguard.errors.plain_text import shown
from fastguard.records.regular_files import NotRegularFile, open_regular

NAME = "manifest.json"
FORMAT = "fastguard checkpoints"
VERSION = 1
# bytes, enough for 50,000 checkpoints; parsed JSON takes twenty times as much memory
_LARGEST = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checkpoints of a store, oldest first.

    Attributes:
        entries: Current checkpoints.
        replaced: Checkpoints set aside by the latest rollback.
        removing: Files about to be removed.
        mode: `"min"` or `"max"`: which metric is best.
        ignore: Patterns of tensors whose NaN and Inf do not count.
        next_serial: Serial number of the next checkpoint.
    """

    entries: tuple[Entry, ...] = ()
    replaced: tuple[Entry, ...] = ()
    removing: tuple[str, ...] = ()
    mode: str = "min"
    ignore: tuple[str, ...] = ()
    next_serial: int = 1

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the current checkpoints."""
        return tuple(entry.file for entry in self.entries)

    def write(self, folder: Path) -> None:
        """Replaces the manifest of a folder atomically."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "next_serial": self.next_serial,
            "checkpoints": [to_json(entry) for entry in self.entries],
            "replaced": [to_json(entry) for entry in self.replaced],
            "removing": list(self.removing),
            "mode": self.mode,
            "ignore": list(self.ignore),
        }
        body["sha256"] = _digest(body)
        write_atomically(folder / NAME, json.dumps(body, indent=1).encode())

    def with_entry(self, entry: Entry) -> Manifest:
        """Returns a copy in which the entry for that file is replaced."""
        return replace(
            self, entries=tuple(entry if e.file == entry.file else e for e in self.entries)
        )


def read(folder: Path) -> Manifest | None:
    """Reads the manifest of a folder; None if it is missing or its checksum is wrong.

    Raises:
        CheckpointError: The manifest is from a newer version.
        DamagedFile: The checksum is right but the contents are invalid, or the manifest is not a
            regular file.
        OSError: The file cannot be read.
    """
    body = _parsed(folder)
    if body is None or body.get("format") != FORMAT:
        return None
    version = body.get("version")
    if not isinstance(version, int) or not is_integer(version) or version < 1:
        return None
    if version > VERSION:
        raise CheckpointError(
            f"{folder / NAME} has version {shown(version)}, but this release reads up to "
            f"{VERSION}; upgrade torch-fastguard, or use another directory"
        )
    try:
        if body.pop("sha256", None) != _digest(body):
            return None
    except RecursionError:
        return None
    try:
        return _manifest(body)
    except ValueError as error:
        raise DamagedFile(
            f"{folder / NAME} is invalid: {error}. No store writes this, so nothing was changed. "
            "If you trust the folder, move the file away; the next run that opens the store for "
            "writing rebuilds it from the checkpoints"
        ) from None


def _manifest(body: Mapping[str, Any]) -> Manifest:
    """Parses a manifest from a JSON object.

    Raises:
        ValueError: The object is not a valid manifest; the message says why.
    """
    entries = _entries(body, "checkpoints")
    replaced = _entries(body, "replaced")
    removing = checked("removing", body.get("removing"), texts)
    for name in removing:
        if names.parse(name.removesuffix(names.REPLACED)) is None:
            raise ValueError(f"removing={shown(name)} is not the name of a checkpoint")
    every_name = [*(e.file for e in entries), *(e.file for e in replaced), *removing]
    for name, times in Counter(every_name).items():
        if times > 1:
            raise ValueError(f"{name} is listed more than once")
    next_serial = checked("next_serial", body.get("next_serial"), count)
    newest = max((e.serial for e in (*entries, *replaced)), default=0)
    if next_serial <= newest:
        raise ValueError(f"next_serial={next_serial} is not larger than serial={newest}")
    if next_serial >= names.MAX_NUMBER:
        raise ValueError(f"next_serial={next_serial} is too large")
    mode = checked("mode", body.get("mode"), text)
    if mode not in ("min", "max"):
        raise ValueError(f"mode={shown(mode)} is neither 'min' nor 'max'")
    return Manifest(
        entries,
        replaced,
        removing,
        mode,
        checked("ignore", body.get("ignore"), texts),
        next_serial,
    )


def _entries(body: Mapping[str, Any], key: str) -> tuple[Entry, ...]:
    values = body.get(key)
    if not isinstance(values, list):
        raise ValueError(f"{key}={shown(values)} is not a list")
    return tuple(map(from_json, values))


def is_ours(folder: Path) -> bool:
    """Whether the manifest of a folder was written by a store of any version."""
    body = _parsed(folder)
    return body is not None and body.get("format") == FORMAT


def is_foreign(folder: Path) -> bool:
    """Whether another tool, such as a web app or a downloader, wrote `manifest.json`."""
    body = _parsed(folder)
    return body is not None and body.get("format") != FORMAT


def _parsed(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest as a JSON object; None if it is missing or damaged.

    Raises:
        DamagedFile: The manifest is a pipe, a device or the like.
        OSError: The file cannot be read.
    """
    try:
        with open_regular(folder / NAME) as file:
            raw = file.read(_LARGEST + 1)
        body = json.loads(raw) if len(raw) <= _LARGEST else None
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    except NotRegularFile as error:
        raise DamagedFile(f"{error.filename} {error.strerror}; nothing was changed") from None
    return body if isinstance(body, dict) else None


def check_tag(tag: Any) -> None:
    """Raises a TypeError if a tag cannot be stored in the manifest."""
    try:
        plain_json(json.loads(json.dumps(tag, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        raise TypeError(
            f"tag={shown(tag)} cannot be stored in the manifest; use strings, numbers, lists, "
            "or str(tag)"
        ) from None


def _digest(body: Mapping[str, Any]) -> str:
    known = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
