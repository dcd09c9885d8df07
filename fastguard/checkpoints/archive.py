"""One checkpoint of a store: a file of `torch.save`, or a folder if the model is sharded.

{"fastguard": the entry's header, "objects": {name: state}, "data": {name: value}, "rng": ...}

Each function is called by all ranks that share the store, and does the same on all, or fails on
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.file_report import Look, look_at_file
from fastguard.checkpoints.reading.inspect_file import sha256_of
from fastguard.checkpoints.sharded import read_write as sharded
from fastguard.checkpoints.sharded import shard_report as shard_looking
from fastguard.peers import Peers

SUFFIX = ".pt"


def suffix_of(states: Mapping[str, Any], peers: Peers) -> str:
    """The end of the name of a checkpoint with these states."""
    return sharded.SUFFIX if peers.size > 1 or sharded.has_shards(states) else SUFFIX


def write(path: Path, payload: Mapping[str, Any], peers: Peers) -> Path:
    """Writes a checkpoint to the temporary name of `path`, which it returns."""
    if path.suffix == sharded.SUFFIX:
        return sharded.write(path, payload, peers)
    return files.write_temporary(path, lambda sink: torch.save(payload, sink))  # type: ignore[arg-type]


def look(path: Path, peers: Peers, *, crc32: bool = True) -> Look:
    """Reads a checkpoint once: every tensor, every checksum.

    Args:
        path: The file or folder.
        peers: Each of them reads a share of a folder.
        crc32: As in `look_at_file`.

    Raises:
        DamagedFile, UnsafeFile, OSError: As `look_at_file`.
    """
    if path.suffix == sharded.SUFFIX:
        return shard_looking.look(path, peers, crc32=crc32)
    return peers.first(lambda: look_at_file(path, crc32=crc32))


def read(path: Path, sha256: str, objects: Mapping[str, Any], peers: Peers) -> dict[str, Any]:
    """The payload, if the checkpoint is what was written.

    Args:
        path: The file or folder.
        sha256: What it must have.
        objects: What the states are for: shards are laid out as these are.
        peers: Who reads it.

    Raises:
        DamagedFile: It has another checksum, or is missing.
    """
    is_folder = path.suffix == sharded.SUFFIX
    try:
        if is_folder:
            found, _ = shard_looking.listing(path, peers)
        else:
            found = peers.first(lambda: sha256_of(path))
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    if found != sha256:
        raise DamagedFile(
            f"{path} changed on disk after it was written: its SHA-256 is {found[:16]}..., the "
            f"manifest has {sha256[:16]}..."
        )
    try:
        if is_folder:
            return sharded.read(path, objects, peers)
        return peers.together(lambda: torch.load(path, map_location="cpu", weights_only=True))
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise DamagedFile(f"{path} cannot be loaded: {error}") from error
