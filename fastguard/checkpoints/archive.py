"""One checkpoint of a store: a file of `torch.save`, or a folder if the model is sharded.

{"fastguard": the entry's header, "objects": {name: state}, "data": {name: value}, "rng": ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fastguard.checkpoints import files, sharded
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.inspection import Inspection, inspect, sha256_of
from fastguard.checkpoints.tree import named_leaves
from fastguard.errors import Culprit

HEADER = "fastguard"
SUFFIX = ".pt"


@dataclass(frozen=True, slots=True)
class Look:
    """What reading a checkpoint from front to back showed.

    Attributes:
        header: What it says of itself.
        sha256: Of the file; of the list of files and their hashes, if it is a folder.
        size: Bytes.
        n_tensors: Tensors in it, those of the random streams aside.
        bad: `(name, nan, posinf, neginf)` of what is non-finite and not ignored.
    """

    header: Mapping[str, Any]
    sha256: str
    size: int
    n_tensors: int
    bad: tuple[Culprit, ...]


def suffix_of(states: Mapping[str, Any]) -> str:
    """The end of the name of a checkpoint with these states."""
    return sharded.SUFFIX if sharded.has_shards(states) else SUFFIX


def write(path: Path, payload: Mapping[str, Any]) -> Path:
    """Writes a checkpoint to the temporary name of `path`, which it returns."""
    if path.suffix == sharded.SUFFIX:
        return sharded.write(path, payload)
    return files.write_temporary(path, lambda sink: torch.save(payload, sink))  # type: ignore[arg-type]


def look(path: Path, ignore: Sequence[str] = (), *, crc32: bool = True) -> Look:
    """Reads a checkpoint once: every tensor, every checksum.

    Args:
        path: The file or folder.
        ignore: Patterns of the tensors whose NaN and Inf do not count.
        crc32: Whether to compare the checksums of its records; spared where the SHA-256 is known.

    Raises:
        DamagedFile: It is not whole, or no checkpoint of a store.
        UnsafeFile: It asks to call a function.
        OSError: It cannot be read.
    """
    if path.is_dir():
        found, shards, listing = sharded.look(path)
        sha256, size = listing
    else:
        found, shards = inspect(path, sha256=True, crc32=crc32), ()
        sha256, size = found.sha256 or "", found.size
    if found.damaged:
        raise DamagedFile(f"{path}: {', '.join(found.damaged)} changed after it was written")
    header = found.contents.tree.get(HEADER) if isinstance(found.contents.tree, dict) else None
    if not isinstance(header, dict):
        raise DamagedFile(f"{path} was not written by CheckpointStore")
    bad = [*found.bad, *shards, *_nan_numbers(found)]
    named = [(_own_name(name), *counts) for name, *counts in bad]
    n_tensors = sharded.count(found.contents.tree) + sum(
        span.name.startswith(("objects.", "data.")) for span in found.contents.spans
    )
    return Look(header, sha256, size, n_tensors, not_ignored(named, ignore))  # type: ignore[arg-type]


def not_ignored(bad: Sequence[Culprit], ignore: Sequence[str]) -> tuple[Culprit, ...]:
    """The culprits that no pattern of `fnmatch` excuses (`"*.attn_mask"`)."""
    return tuple(c for c in bad if not any(fnmatchcase(c[0], pattern) for pattern in ignore))


def read(path: Path, sha256: str, objects: Mapping[str, Any]) -> dict[str, Any]:
    """The payload, if the checkpoint is what was written.

    Args:
        path: The file or folder.
        sha256: What it must have.
        objects: What the states are for: shards are laid out as these are.

    Raises:
        DamagedFile: It has another checksum, or is missing.
    """
    try:
        found = sharded.listing(path)[0] if path.is_dir() else sha256_of(path)
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    if found != sha256:
        raise DamagedFile(
            f"{path} changed on disk after it was written: its SHA-256 is {found[:16]}..., the "
            f"manifest has {sha256[:16]}..."
        )
    try:
        if path.is_dir():
            return sharded.read(path, objects)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise DamagedFile(f"{path} cannot be loaded: {error}") from error


def _nan_numbers(found: Inspection) -> list[Culprit]:
    """Python floats in the states that are NaN: a learning rate, the scale of a GradScaler.

    Infinite ones are left alone: `ReduceLROnPlateau` starts with one, and `max_norm` may be one.
    """
    return [
        (name, 1, 0, 0)
        for name, leaf in named_leaves(found.contents.tree)
        if isinstance(leaf, float) and leaf != leaf and name.startswith("objects.")
    ]


def _own_name(name: str) -> str:
    for part in ("objects.", "data."):
        name = name.removeprefix(part)
    return name
