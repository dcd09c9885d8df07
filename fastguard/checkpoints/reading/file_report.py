"""Summarizes one file of a checkpoint: its header, size, checksum and non-finite tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inspect_file import inspect
from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.checkpoints.reading.spans import Contents
from fastguard.errors import Culprit

HEADER = "fastguard"
SHARD = "__fastguard_shard__"
"""Key of the placeholder for a tensor that `torch.distributed.checkpoint` stores."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """The result of reading a whole checkpoint, or one of its files.

    Attributes:
        header: The checkpoint's own metadata; None for a file that only holds shards.
        sha256: Checksum of the file; for a folder, of the list of files and their hashes.
        size: Size in bytes.
        tensors: Names of the tensors, except tensors of random states.
        bad: `(name, nan, posinf, neginf)` for each non-finite tensor or number.
    """

    header: Mapping[str, Any] | None
    sha256: str
    size: int
    tensors: frozenset[str]
    bad: tuple[Culprit, ...]


def report_on_file(path: Path, *, crc32: bool = True) -> FileReport:
    """Reads a `torch.save` file; checks every tensor and checksum; does not follow links.

    Args:
        path: The file.
        crc32: Whether to check the checksums of the records; not needed if the SHA-256 is known.

    Raises:
        DamagedFile: The file is incomplete, or not a checkpoint of a store.
        UnsafeFile: The file would call a function that no checkpoint needs; nothing was
            executed.
        OSError: The file cannot be read, or is not a regular file.
    """
    found = inspect(path, sha256=True, crc32=crc32, follow_links=False)
    if found.damaged:
        raise DamagedFile(f"{path}: {', '.join(found.damaged)} changed after the file was written")
    check_loadable(path, found.contents)
    tree = found.contents.tree
    header = tree.get(HEADER) if isinstance(tree, dict) else None
    if not isinstance(header, dict):
        raise DamagedFile(f"{path} was not written by CheckpointStore")
    names = {span.name for span in found.contents.spans}
    names |= {
        name.removesuffix(f".{SHARD}")
        for name, _ in named_leaves(tree)
        if name.endswith(f".{SHARD}")
    }
    nan = [(name, 1, 0, 0) for name in found.contents.nan if name.startswith("objects.")]
    return FileReport(
        header=header,
        sha256=found.sha256 or "",
        size=found.size,
        tensors=frozenset(own_name(n) for n in names if n.startswith(("objects.", "data."))),
        bad=tuple((own_name(n), *counts) for n, *counts in (*found.bad, *nan)),  # type: ignore[misc]
    )


def check_loadable(path: Path, contents: Contents) -> None:
    """Raises a DamagedFile if a store cannot load the file, whichever classes are registered."""
    if contents.refused:
        raise DamagedFile(
            f"{path} was not written by CheckpointStore: torch.load(weights_only=True) refuses "
            f"{', '.join(contents.refused)}"
        )


def own_name(name: str) -> str:
    """Converts a name within the payload to the name that the user knows."""
    for part in ("objects.", "data."):
        name = name.removeprefix(part)
    return name


def not_ignored(bad: Sequence[Culprit], ignore: Sequence[str]) -> tuple[Culprit, ...]:
    """Returns the non-finite tensors that match no `fnmatch` pattern (`"*.attn_mask"`)."""
    return tuple(c for c in bad if not any(fnmatchcase(c[0], pattern) for pattern in ignore))
