"""Writes and reads one checkpoint of a store: a `torch.save` file, or a folder for sharded models.

The payload is {"fastguard": header, "objects": {name: state}, "data": {name: value}, "rng": ...}.

These functions are collective: every rank that shares the store calls them, and either all ranks
succeed or all ranks fail.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints import names
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.file_report import FileReport, report_on_file
from fastguard.checkpoints.reading.inspect_file import sha256_of_open
from fastguard.checkpoints.sharded import read_write as sharded
from fastguard.checkpoints.sharded import shard_report
from fastguard.checkpoints.sharded.open_files import OpenFiles, TouchedFile
from fastguard.ranks.lockstep import Peers
from fastguard.records.regular_files import NotRegularFile, open_regular

# reads are repeated once, since a new or removed hard link (by a backup or rotation) looks like a
# change of the file
_ATTEMPTS = 2


def suffix_of(states: Mapping[str, Any], peers: Peers) -> str:
    """Returns the filename suffix for a checkpoint that contains these states."""
    return names.FOLDER if peers.size > 1 or sharded.has_shards(states) else names.FILE


def write(path: Path, payload: Mapping[str, Any], peers: Peers) -> Path:
    """Writes a checkpoint under the temporary name of `path` and returns that name."""
    if path.suffix == names.FOLDER:
        return sharded.write(path, payload, peers)
    return files.write_temporary(path, lambda sink: torch.save(payload, sink))  # type: ignore[arg-type]


def report_on(path: Path, peers: Peers, *, crc32: bool = True) -> FileReport:
    """Reads a whole checkpoint and checks every tensor and checksum.

    Args:
        path: The file or folder.
        peers: The ranks that share the work; each reads a part of a folder.
        crc32: See `report_on_file`.

    Raises:
        DamagedFile, UnsafeFile, OSError: See `report_on_file`.
    """
    if path.suffix == names.FOLDER:
        return shard_report.report_on(path, peers, crc32=crc32)
    return peers.first(lambda: report_on_file(path, crc32=crc32))


def read(path: Path, sha256: str, objects: Mapping[str, Any], peers: Peers) -> dict[str, Any]:
    """Returns the payload after checking that the checkpoint is unchanged.

    Args:
        path: The file or folder.
        sha256: The expected checksum.
        objects: The objects to restore; their tensors determine how shards are distributed.
        peers: The ranks that read the checkpoint.

    Raises:
        DamagedFile: The checksum differs, or the checkpoint is missing.
    """
    try:
        if path.suffix != names.FOLDER:
            return peers.together(lambda: _read_file(path, sha256))
        with OpenFiles(path) as opened:
            for _ in range(_ATTEMPTS - 1):
                with contextlib.suppress(TouchedFile):
                    return _read_shards(opened, sha256, objects, peers)
            return _read_shards(opened, sha256, objects, peers)
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    except NotRegularFile as error:
        raise DamagedFile(f"{error.filename} {error.strerror}") from None
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise DamagedFile(f"{path} cannot be loaded: {error}") from error


def _read_file(path: Path, sha256: str) -> dict[str, Any]:
    """Hashes and loads a file through one descriptor, so that both read the same file."""
    with open_regular(path, follow_links=False) as file:
        for _ in range(_ATTEMPTS):
            before = _version(file)
            _compare(path, sha256_of_open(file), sha256)
            payload = torch.load(file, map_location="cpu", weights_only=True)
            after = _version(file)
            if after == before:
                return payload
            if after[:2] != before[:2]:
                break
    raise DamagedFile(f"{path} was changed while it was being read")


def _read_shards(
    opened: OpenFiles, sha256: str, objects: Mapping[str, Any], peers: Peers
) -> dict[str, Any]:
    """Hashes the files of a folder and loads the same files."""
    opened.forget()
    _compare(opened.folder, shard_report.listing(opened, peers), sha256)
    return sharded.read(opened.folder, objects, peers, opened)


def _version(file: BinaryIO) -> tuple[int, int, int]:
    """Returns size, modification time and change time; programs cannot set the change time."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DamagedFile(
            f"{path} changed on disk after it was written: its SHA-256 is {found[:16]}..., the "
            f"manifest has {expected[:16]}..."
        )
