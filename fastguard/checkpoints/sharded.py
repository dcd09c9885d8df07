"""Checkpoints of sharded models: a folder, written and read by `torch.distributed.checkpoint`.

    step-.../rest.pt        everything but the shards, as in an unsharded checkpoint
    step-.../*.distcp       the DTensors, by rank; read back onto any mesh
    step-.../.metadata      where each shard lies

Only tensors go through `torch.distributed.checkpoint`: it would pickle other values and load them
with `weights_only=False`. Its `.metadata` is a pickle too, read here with the classes it consists
of and no others.

One process writes; several ranks on one store are refused.
"""

from __future__ import annotations

import enum
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.buckets import bucketize
from fastguard.checkpoints import files
from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.inspection import Inspection, inspect, sha256_of
from fastguard.checkpoints.tree import named_leaves
from fastguard.errors import Culprit
from fastguard.measure import measure

SUFFIX = ".sharded"
REST = "rest.pt"
_SHARD = "__fastguard_shard__"
_METADATA = ".metadata"
_ALLOWED = {
    **{
        name: "torch.distributed.checkpoint.metadata"
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        )
    },
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
    "PosixPath": "pathlib",
}  # fmt: skip


def has_shards(tree: Any) -> bool:
    """Whether any tensor is a DTensor. Costs nothing where torch.distributed is not in use."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(True for _ in _shards(tree, ""))


def _is_shard(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _shards(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if _is_shard(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _shards(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _shards(value, f"{path}.{i}")


def write(path: Path, payload: Mapping[str, Any]) -> Path:
    """Writes a checkpoint to the temporary name of the folder `path`, which it returns.

    Raises:
        CheckpointError: There are several ranks, or a tensor is neither sharded nor replicated.
        OSError: The disk is full or read-only; nothing is left behind.
    """
    import torch.distributed.checkpoint as dcp

    if torch.distributed.get_world_size() > 1:
        raise CheckpointError(
            "a store of sharded checkpoints serves one process in this release; with several "
            "ranks use torch.distributed.checkpoint itself"
        )
    shards = dict(_shards(payload, ""))
    temporary = path.with_name(f"{files.TEMPORARY}{path.name}")
    try:
        temporary.mkdir()
        rest = _without_shards(payload, "")
        files.commit(
            files.write_temporary(temporary / REST, lambda sink: torch.save(rest, sink)),  # type: ignore[arg-type]
            temporary / REST,
        )
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        dcp.save(shards, storage_writer=writer)
        files.sync_folder(temporary)
    except BaseException as error:
        if temporary.exists():
            files.remove(temporary)
        cause = error.__cause__ or error.__context__
        if isinstance(error, Exception) and isinstance(cause, OSError):
            raise cause from None
        raise
    return temporary


def _without_shards(tree: Any, path: str) -> Any:
    if _is_shard(tree):
        return {
            _SHARD: path,
            "mesh": list(tree.device_mesh.shape),
            "placements": [_dimension(p, path) for p in tree.placements],
        }
    if isinstance(tree, Mapping):
        return {k: _without_shards(v, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(_without_shards(v, f"{path}.{i}") for i, v in enumerate(tree))
    return tree


def _dimension(placement: Any, path: str) -> int | None:
    """The dimension that a placement shards; None if it replicates."""
    if placement.is_partial():
        raise CheckpointError(f"{path} is {placement}: make it whole before saving")
    return placement.dim if placement.is_shard() else None


def look(folder: Path) -> tuple[Inspection, tuple[Culprit, ...], tuple[str, int]]:
    """Reads a folder once: `rest.pt`, the non-finite shards, and `(sha256, size)` of it all."""
    try:
        found = inspect(folder / REST)
        metadata = _read_metadata(folder)
        bad = _nonfinite(folder, metadata.storage_data)
        return found, bad, listing(folder)
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename} is missing") from None
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # of torch, or names and numbers that make no sense
        raise DamagedFile(f"{folder} is damaged ({error})") from None


def _nonfinite(folder: Path, storage_data: Mapping[Any, Any]) -> tuple[Culprit, ...]:
    """The shards with NaN or Inf. Holds one of them at a time."""
    bad: dict[str, list[int]] = {}
    for index, place in storage_data.items():
        shard = _stored(folder, place)
        if shard.is_floating_point() or shard.is_complex():
            for _, *counts in measure(bucketize([shard])).culprits():
                so_far = bad.get(index.fqn, [0, 0, 0])
                bad[index.fqn] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return tuple((name, *counts) for name, counts in bad.items())  # type: ignore[misc]


def _stored(folder: Path, place: Any) -> Tensor:
    name = Path(place.relative_path)
    if name.name != place.relative_path:
        raise UnsafeFile(f"{folder / _METADATA} points to {name}, outside its folder")
    with open(folder / name, "rb") as file:
        file.seek(place.offset)
        raw = file.read(place.length)
    if len(raw) != place.length:
        raise DamagedFile(f"truncated: {folder / name}")
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def listing(folder: Path) -> tuple[str, int]:
    """The SHA-256 of what `sha256sum * .metadata` prints in the folder, and its size in bytes."""
    names = sorted(os.listdir(folder))
    lines = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    size = sum((folder / name).stat().st_size for name in names)
    return hashlib.sha256(lines.encode()).hexdigest(), size


def count(tree: Any) -> int:
    """How many shards a tree of `rest.pt` refers to."""
    return sum(1 for name, _ in named_leaves(tree) if name.rpartition(".")[2] == _SHARD)


def read(folder: Path, objects: Mapping[str, Any]) -> dict[str, Any]:
    """The payload. Shards come back on the mesh of the objects' own, else as whole tensors."""
    import torch.distributed.checkpoint as dcp

    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    metadata = _read_metadata(folder)
    meshes = {}
    for value in objects.values():
        if callable(getattr(value, "state_dict", None)):
            for _, shard in _shards(value.state_dict(), ""):
                meshes.setdefault(tuple(shard.device_mesh.shape), shard.device_mesh)
    tensors: dict[str, Tensor] = {}
    payload = _with_tensors(rest, metadata, meshes, tensors)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            found = _read_metadata(folder)
            found.storage_meta.load_id = self.load_id
            return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "no process group": one process reads all
        dcp.load(tensors, storage_reader=Reader(folder))
    return payload


def _with_tensors(tree: Any, metadata: Any, meshes: Mapping, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Mapping):
        if _SHARD in tree:
            name = tree[_SHARD]
            tensors[name] = _empty(metadata.state_dict_metadata[name], tree, meshes)
            return tensors[name]
        return {k: _with_tensors(v, metadata, meshes, tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(_with_tensors(v, metadata, meshes, tensors) for v in tree)
    return tree


def _empty(stored: Any, marker: Mapping[str, Any], meshes: Mapping) -> Tensor:
    size, dtype = stored.size, stored.properties.dtype
    mesh = meshes.get(tuple(marker["mesh"]))
    if mesh is None:
        return torch.empty(size, dtype=dtype)
    from torch.distributed.tensor import Replicate, Shard, empty

    placements = [Replicate() if d is None else Shard(d) for d in marker["placements"]]
    return empty(*size, dtype=dtype, device_mesh=mesh, placements=placements)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if _ALLOWED.get(name) != module:
            raise UnsafeFile(
                f"the metadata asks for {module}.{name}, which torch.distributed.checkpoint does "
                "not write; nothing was executed"
            )
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Any:
    """What `getattr` is asked for by Python 3.11.0 to 3.11.3, which pickle enum members by it."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise UnsafeFile(f"the metadata asks for {name} of {kind!r}; nothing was executed")
    return kind[name]


def _read_metadata(folder: Path) -> Any:
    with open(folder / _METADATA, "rb") as file:
        try:
            return _MetadataUnpickler(file).load()
        except CheckpointError:
            raise
        except Exception as error:
            raise DamagedFile(f"{folder / _METADATA} cannot be read ({error})") from None
