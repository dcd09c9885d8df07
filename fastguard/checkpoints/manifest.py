"""`manifest.json`: what a store holds, and what is known of each checkpoint.

It carries its own SHA-256, so that a damaged one is noticed; then, or when it is lost, it is built
again from the checkpoints, each of which repeats its own entry (`Entry.header`). One of a newer
version is never touched.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastguard.checkpoints.durable_files import write_atomically
from fastguard.checkpoints.errors import CheckpointError
from fastguard.errors import Culprit, describe_culprits

NAME = "manifest.json"
FORMAT = "fastguard checkpoints"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint.

    Attributes:
        serial: Its place in the order of saving; never used twice in a store.
        file: Its name in the directory.
        step, epoch: Where training stood.
        metric: What `best` compares; None if not given.
        tag: Whatever the caller gave.
        time: When it was saved, ISO 8601, UTC.
        incidents: Skipped steps and the like since the last clean checkpoint before this one.
        notes: The last of them, one line each.
        skipped_steps: Of the whole run so far, if a `GuardedOptimizer` was saved; without those
            that only lowered a loss scale.
        n_tensors: How many tensors were looked at.
        bad: `(name, nan, posinf, neginf)` of each that holds NaN or Inf; numbers that are NaN, such
            as a learning rate, count as tensors of one element.
        sha256: Of the file.
        size: Bytes.
        verified: Read back whole after it was written, and found as written.
    """

    serial: int
    file: str
    step: int
    epoch: int | None = None
    metric: float | None = None
    tag: Any = None
    time: str = ""
    incidents: int = 0
    notes: tuple[str, ...] = ()
    skipped_steps: int | None = None
    n_tensors: int = 0
    bad: tuple[Culprit, ...] = ()
    sha256: str = ""
    size: int = 0
    verified: bool = False

    @property
    def finite(self) -> bool:
        """Whether every tensor is finite."""
        return not self.bad

    @property
    def clean(self) -> bool:
        """Whether it is finite and known to be on disk as it was written."""
        return self.finite and self.verified

    @property
    def header(self) -> dict[str, Any]:
        """What the checkpoint itself repeats, so that the manifest can be built again."""
        known = _to_json(self)
        return {key: known[key] for key in _HEADER}

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"step {self.step}"]
        if self.epoch is not None:
            parts.append(f"epoch {self.epoch}")
        if self.metric is not None:
            parts.append(f"metric {self.metric:g}")
        verdict = "clean" if self.clean else "damaged" if self.finite else "not finite"
        parts.append(verdict if self.finite else f"{verdict}: {describe_culprits(self.bad)}")
        return f"{self.file} ({', '.join(parts)})"


_HEADER = (
    "serial", "step", "epoch", "metric", "tag", "time", "incidents", "notes", "skipped_steps",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checkpoints of a store, oldest first.

    Attributes:
        entries: Those that count.
        replaced: Those that the latest rollback put aside.
        removing: Files that are about to be removed.
        mode: `"min"` or `"max"`: which metric is the best.
        ignore: Patterns of the tensors whose NaN and Inf do not count.
        next_serial: Of the next checkpoint.
    """

    entries: tuple[Entry, ...] = ()
    replaced: tuple[Entry, ...] = ()
    removing: tuple[str, ...] = ()
    mode: str = "min"
    ignore: tuple[str, ...] = ()
    next_serial: int = 1

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the checkpoints that count."""
        return tuple(entry.file for entry in self.entries)

    def write(self, folder: Path) -> None:
        """Replaces the manifest of a folder, atomically."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "next_serial": self.next_serial,
            "checkpoints": [_to_json(entry) for entry in self.entries],
            "replaced": [_to_json(entry) for entry in self.replaced],
            "removing": list(self.removing),
            "mode": self.mode,
            "ignore": list(self.ignore),
        }
        body["sha256"] = _digest(body)
        write_atomically(folder / NAME, json.dumps(body, indent=1).encode())

    def with_entry(self, entry: Entry) -> Manifest:
        """The same, with the entry of that file replaced."""
        return replace(
            self, entries=tuple(entry if e.file == entry.file else e for e in self.entries)
        )


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if there is none, or none that can be trusted.

    Raises:
        CheckpointError: It is of a newer version.
    """
    body = _parsed(folder)
    if body is None or body.get("format") != FORMAT:
        return None
    try:
        version = int(body["version"])
    except (ValueError, TypeError, KeyError):
        return None
    if version > VERSION:
        raise CheckpointError(
            f"{folder / NAME} has version {version}, this release reads up to {VERSION}; upgrade "
            "torch-fastguard, or use another directory"
        )
    try:
        if body.pop("sha256") != _digest(body):
            return None
        return Manifest(
            tuple(map(from_json, body["checkpoints"])),
            tuple(map(from_json, body["replaced"])),
            tuple(body["removing"]),
            str(body["mode"]),
            tuple(body["ignore"]),
            int(body["next_serial"]),
        )
    except (ValueError, TypeError, KeyError):
        return None


def is_ours(folder: Path) -> bool:
    """Whether the manifest of a folder says that a store wrote it, in whatever version."""
    body = _parsed(folder)
    return body is not None and body.get("format") == FORMAT


def is_foreign(folder: Path) -> bool:
    """Whether it says anything else: web pages and downloaders have a `manifest.json` too."""
    body = _parsed(folder)
    return body is not None and body.get("format") != FORMAT


def _parsed(folder: Path) -> dict[str, Any] | None:
    """The JSON object that the manifest is; None if there is none, or it is damaged."""
    try:
        body = json.loads((folder / NAME).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def check_tag(tag: Any) -> None:
    """Raises a TypeError if a tag cannot be written to the manifest."""
    try:
        json.dumps(tag, allow_nan=False)
    except (TypeError, ValueError):
        raise TypeError(
            f"tag={tag!r} cannot be kept in the manifest; use strings, numbers, lists, or str(tag)"
        ) from None


def _digest(body: Mapping[str, Any]) -> str:
    known = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _to_json(entry: Entry) -> dict[str, Any]:
    values = json.loads(json.dumps(asdict(entry)))  # tuples are lists there
    metric = entry.metric
    if metric is not None and not math.isfinite(metric):
        values["metric"] = str(metric)  # JSON has no NaN
    return values


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "metric": lambda v: None if v is None else float(v),
    "notes": tuple,
    "bad": lambda rows: tuple((str(name), *map(int, counts)) for name, *counts in rows),
}


def from_json(values: Mapping[str, Any]) -> Entry:
    """The entry that was written so; keys of other releases are ignored.

    Raises:
        TypeError, ValueError: It is no entry.
    """
    known = {f.name for f in fields(Entry)}
    return Entry(**{k: _CONVERT.get(k, _same)(v) for k, v in values.items() if k in known})


def _same(value: Any) -> Any:
    return value
