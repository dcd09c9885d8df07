"""Saves the checkpoint of several ranks, or of a sharded model, as a folder.

    step-.../rest.pt        everything except the shards, as in an unsharded checkpoint
    step-.../rest-1.pt      the same for rank 1: its random states, data position, own tensors
    step-.../*.distcp       the DTensors, by rank; can be loaded onto any mesh
    step-.../.metadata      the position of each shard

Tensors with the same bytes on every rank are stored once, with the shards. Only tensors go through
`torch.distributed.checkpoint`, which would pickle other values and load them with
`weights_only=False`.

Every function here is collective: it succeeds on all ranks, or raises the same error on all. If a
rank dies, torch raises an error on the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.errors import CheckpointError
from fastguard.checkpoints.reading.file_report import SHARD, own_name
from fastguard.checkpoints.sharded.layouts import Layouts
from fastguard.checkpoints.sharded.metadata import NAME as METADATA
from fastguard.checkpoints.sharded.metadata import metadata_in
from fastguard.checkpoints.sharded.open_files import OpenFiles
from fastguard.checkpoints.sharded.shard_report import rest_name
from fastguard.checkpoints.sharded.shared_tensors import is_shard, names_of_shared, tensors
from fastguard.ranks.lockstep import Peers

RANKS = "ranks"  # payload key: number of ranks that wrote it
# payload keys that ranks may share; each rank has its own random states
_PARTS = ("objects", "data")


def has_shards(tree: Any) -> bool:
    """Whether any tensor is a DTensor. Costs nothing if torch.distributed is not used."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(is_shard(t) for _, t in tensors(tree))


# Writes folders.


def write(path: Path, payload: Mapping[str, Any], peers: Peers) -> Path:
    """Writes a checkpoint under the temporary name of the folder `path` and returns that name.

    Raises:
        CheckpointError: A tensor is neither sharded nor replicated, or is spread over other ranks.
        OSError: The disk is full or read-only; nothing is left behind.
    """
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(f"{files.TEMPORARY}{path.name}")
    shared = peers.together(lambda: _shared(payload))
    names = names_of_shared(shared, peers)
    shards: dict[str, Tensor] = {}
    rest = peers.together(
        lambda: {
            **payload,
            **{part: _split(payload[part], part, names, shards) for part in _PARTS},
            RANKS: peers.size,
        }
    )
    try:
        peers.first(temporary.mkdir)
        peers.together(lambda: _write_rest(temporary / rest_name(peers.rank), rest))
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "no process group": one process writes
            dcp.save(
                shards,
                storage_writer=writer,
                process_group=peers.group,
                no_dist=peers.size == 1,
            )
        peers.first(lambda: files.sync_folder(temporary))
    except BaseException as error:
        if peers.is_first and temporary.exists():
            files.remove(temporary)
        cause = _cause_of(error)
        if cause is not None:
            raise cause from None
        raise
    return temporary


def _shared(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the payload parts that ranks may share, after checking the shard placements."""
    shared = {part: payload[part] for part in _PARTS}
    for path, tensor in tensors(shared):
        if is_shard(tensor) and any(p.is_partial() for p in tensor.placements):  # type: ignore[attr-defined]
            raise CheckpointError(f"{path} is a partial DTensor; redistribute it before saving")
    return shared


def _write_rest(path: Path, rest: Mapping[str, Any]) -> None:
    files.commit(files.write_temporary(path, lambda sink: torch.save(rest, sink)), path)  # type: ignore[arg-type]


def _cause_of(error: BaseException) -> OSError | CheckpointError | None:
    """Returns the error of a file wrapped in an error of torch.distributed.checkpoint, if any.

    torch's error is not an `Exception`, so it would end the run as a KeyboardInterrupt does.
    """
    if isinstance(error, OSError | CheckpointError):
        return None
    wrapped = [failure[0] for failure in getattr(error, "failures", {}).values()]
    before = (error.__cause__, error.__context__) if isinstance(error, Exception) else ()
    for cause in (*wrapped, *before):
        if isinstance(cause, OSError | CheckpointError):
            return cause
    return None


def _split(tree: Any, path: str, names: Mapping[str, str], shards: dict[str, Tensor]) -> Any:
    """Replaces each shared tensor in the tree with a marker and adds it to `shards`."""
    if isinstance(tree, Tensor):
        if path not in names:
            return tree
        shards[names[path]] = tree
        mesh, placements = [], []
        if is_shard(tree):
            mesh = list(tree.device_mesh.shape)  # type: ignore[attr-defined]
            placements = [p.dim if p.is_shard() else None for p in tree.placements]  # type: ignore[attr-defined]
        return {SHARD: names[path], "mesh": mesh, "placements": placements}
    if isinstance(tree, Mapping):
        return {
            k: _split(v, f"{path}.{k}" if path else str(k), names, shards) for k, v in tree.items()
        }
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(_split(v, f"{path}.{i}", names, shards) for i, v in enumerate(tree))
    return tree


# Reads folders.


def read(
    folder: Path, objects: Mapping[str, Any], peers: Peers, opened: OpenFiles | None = None
) -> dict[str, Any]:
    """Returns the payload; shards use the mesh of the given objects, or become whole tensors.

    Args:
        folder: The folder.
        objects: The objects to restore.
        peers: The ranks that read it.
        opened: The files of the folder as hashed before; None to open them now.

    Raises:
        CheckpointError: Another number of ranks saved the checkpoint, and their values differed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystem

    if opened is None:
        with OpenFiles(folder) as opened:
            return read(folder, objects, peers, opened)
    rest = peers.together(lambda: _rest(opened, peers, strict=bool(objects)))
    metadata = peers.together(lambda: _metadata(opened))
    layouts = Layouts(objects)
    empty: dict[str, Tensor] = {}
    payload = peers.together(
        lambda: {
            part: _with_tensors(tree, "", metadata, layouts, empty) for part, tree in rest.items()
        }
    )

    class Streams(FileSystem):
        @contextlib.contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
            with opened.open(os.path.relpath(path, folder)) as file:
                yield file

    class Reader(dcp.FileSystemReader):
        def __init__(self) -> None:
            super().__init__(folder)
            self.fs = Streams()

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata.storage_meta.load_id = self.load_id
            return metadata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "no process group": one process reads all
        try:
            dcp.load(
                empty,
                storage_reader=Reader(),
                process_group=peers.group,
                no_dist=peers.size == 1,
            )
        except BaseException as error:
            cause = _cause_of(error)
            if cause is not None:
                raise cause from None
            raise
    peers.together(opened.check_unchanged)
    return payload


def _metadata(opened: OpenFiles) -> Any:
    with opened.open(METADATA) as file:
        return metadata_in(file, opened.folder)


def _rest(opened: OpenFiles, peers: Peers, *, strict: bool) -> dict[str, Any]:
    """Loads the values that ranks do not share.

    If the number of ranks differs, loads the values of rank 0.
    """

    def load(rank: int) -> dict[str, Any]:
        with opened.open(rest_name(rank)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    rest = load(0)
    ranks = rest.pop(RANKS, 1)
    if ranks == peers.size:
        return load(peers.rank) if peers.rank else rest
    if ranks > 1 and strict:
        own = next((path for path, _ in tensors({part: rest[part] for part in _PARTS})), None)
        if own is not None:
            raise CheckpointError(
                f"{opened.folder} was saved by {ranks} ranks, each with its own values of "
                f"{own_name(own)}; load it with {ranks} ranks, not {peers.size}, or without "
                "objects, which returns rank 0's values"
            )
    rest["rng"] = {"ranks": ranks}
    return rest


def _with_tensors(
    tree: Any, path: str, metadata: Any, layouts: Layouts, found: dict[str, Tensor]
) -> Any:
    """Replaces each marker in the tree with an empty tensor and adds it to `found` by name."""
    if isinstance(tree, Mapping):
        if SHARD in tree:
            name = tree[SHARD]
            if name not in found:
                found[name] = layouts.empty(path, metadata.state_dict_metadata[name], tree)
            return found[name]
        return {
            k: _with_tensors(v, f"{path}.{k}" if path else str(k), metadata, layouts, found)
            for k, v in tree.items()
        }
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(
            _with_tensors(v, f"{path}.{i}", metadata, layouts, found) for i, v in enumerate(tree)
        )
    return tree
