"""What reading one file of a checkpoint shows: whose it is, what it weighs, what is non-finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastguard.checkpoints.errors import DamagedFile
from fastguard.checkpoints.reading.inspect_file import inspect
from fastguard.checkpoints.reading.named_leaves import named_leaves
from fastguard.errors import Culprit

HEADER = "fastguard"
SHARD = "__fastguard_shard__"
"""Key of what stands in a tree for a tensor that `torch.distributed.checkpoint` keeps."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What reading a checkpoint, or one file of it, from front to back showed.

    Attributes:
        header: What it says of itself; None for a file that holds shards alone.
        sha256: Of the file; of the list of files and their hashes, if it is a folder.
        size: Bytes.
        tensors: Names of the tensors in it, those of the random streams aside.
        bad: `(name, nan, posinf, neginf)` of what is non-finite.
    """

    header: Mapping[str, Any] | None
    sha256: str
    size: int
    tensors: frozenset[str]
    bad: tuple[Culprit, ...]


def look_at_file(path: Path, *, crc32: bool = True) -> FileReport:
    """Reads a file that `torch.save` wrote: every tensor, every checksum. Follows no link.

    Args:
        path: The file.
        crc32: Whether to compare the checksums of its records; spared where the SHA-256 is known.

    Raises:
        DamagedFile: It is not whole, or no checkpoint of a store.
        UnsafeFile: It asks to call a function.
        OSError: It cannot be read, or is no regular file.
    """
    found = inspect(path, sha256=True, crc32=crc32, follow_links=False)
    if found.damaged:
        raise DamagedFile(f"{path}: {', '.join(found.damaged)} changed after it was written")
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
    nan = (number for number in nan_numbers(tree) if number[0].startswith("objects."))
    return FileReport(
        header=header,
        sha256=found.sha256 or "",
        size=found.size,
        tensors=frozenset(own_name(n) for n in names if n.startswith(("objects.", "data."))),
        bad=tuple((own_name(n), *counts) for n, *counts in (*found.bad, *nan)),  # type: ignore[misc]
    )


def own_name(name: str) -> str:
    """The name that a user knows of something in the payload."""
    for part in ("objects.", "data."):
        name = name.removeprefix(part)
    return name


def not_ignored(bad: Sequence[Culprit], ignore: Sequence[str]) -> tuple[Culprit, ...]:
    """The culprits that no pattern of `fnmatch` excuses (`"*.attn_mask"`)."""
    return tuple(c for c in bad if not any(fnmatchcase(c[0], pattern) for pattern in ignore))


def nan_numbers(tree: Any) -> list[Culprit]:
    """Python floats in a checkpoint that are NaN: a learning rate, the scale of a GradScaler.

    Infinite ones are left alone: `ReduceLROnPlateau` starts with one, and `max_norm` may be one.
    """
    return [
        (name, 1, 0, 0)
        for name, leaf in named_leaves(tree)
        if isinstance(leaf, float) and leaf != leaf
    ]
