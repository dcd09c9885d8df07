"""Reads the pickle `.metadata` of `torch.distributed.checkpoint` without executing it.

torch unpickles this file without restrictions. This module reads it as any other checkpoint, with
`load_inert`, which calls nothing and bounds the work. Then it checks every value and builds torch's
objects from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.inert_unpickler import load_inert
from fastguard.checkpoints.reading.inert_values import Name, StandIn, kind_of
from fastguard.records.regular_files import open_regular

NAME = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_ENCODING = f"{_MODULE}._MEM_FORMAT_ENCODING"
_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}


def read_metadata(folder: Path) -> Any:
    """Returns the `Metadata` of a folder written by `torch.distributed.checkpoint`.

    Raises:
        UnsafeFile: The file would call a function; nothing was executed.
        DamagedFile: The file is not a valid metadata file.
        OSError: The file cannot be read.
    """
    with open_regular(folder / NAME, follow_links=False) as file:
        return metadata_in(file, folder)


def metadata_in(file: BinaryIO, folder: Path) -> Any:
    """Like `read_metadata`, for an open file."""
    try:
        return _metadata(load_inert(file))
    except CheckpointError as error:
        raise type(error)(f"{folder / NAME}: {error}") from None
    except Exception as error:  # raised by torch's own classes for invalid values
        raise DamagedFile(f"{folder / NAME} cannot be read ({error!s:.200})") from None


def _metadata(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    state = _state(value, f"{_MODULE}.Metadata")
    tensors = _mapping(state["state_dict_metadata"])
    places = _mapping(state["storage_data"])
    return Metadata(
        {_text(name): _tensor(tensor) for name, tensor in tensors.items()},
        planner_data=_planner_data(state.get("planner_data")),
        storage_data={_index(index): _place(place) for index, place in places.items()},
        storage_meta=_storage_meta(state.get("storage_meta")),
        **_known(Metadata, version=_optional_text(state.get("version"))),
    )


def _tensor(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        TensorStorageMetadata,
    )

    if isinstance(value, StandIn) and value.qualified_name == f"{_MODULE}.BytesStorageMetadata":
        return BytesStorageMetadata()
    state = _state(value, f"{_MODULE}.TensorStorageMetadata")
    chunks = []
    for chunk in _items(state["chunks"]):
        place = _state(chunk, f"{_MODULE}.ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(place["offsets"]), _size(place["sizes"])))
    return TensorStorageMetadata(_properties(state["properties"]), _size(state["size"]), chunks)


def _properties(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import TensorProperties

    _check_kind(value, f"{_MODULE}.TensorProperties")
    dtype, layout, requires_grad, memory_format, pin_memory = value.parts[-1]
    layout = getattr(torch, _text(layout).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not isinstance(layout, torch.layout):
        raise _damaged(dtype)
    return TensorProperties(
        dtype, layout, requires_grad is True, _memory_format(memory_format), pin_memory is True
    )


def _memory_format(value: Any) -> torch.memory_format:
    """Returns an enum member by value, or by name as Python 3.11.0 to 3.11.3 pickle it."""
    if isinstance(value, Name):
        kind, _, name = value.qualified_name.rpartition(".")
        if kind == _ENCODING and name in _FORMATS:
            return _FORMATS[name]
    elif isinstance(value, StandIn) and value.qualified_name == _ENCODING and value.parts:
        (number,) = value.parts[0]
        return list(_FORMATS.values())[_integer(number)]
    raise _damaged(value)


def _index(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    state = _state(value, f"{_MODULE}.MetadataIndex")
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _text(state["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _integer(index),
    )


def _place(value: Any) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    state = _state(value, f"{_FILES}._StorageInfo")
    transforms = state.get("transform_descriptors")
    if transforms is not None:
        transforms = [_text(item) for item in _items(transforms)]
    path, offset, length = state["relative_path"], state["offset"], state["length"]
    return _StorageInfo(
        _text(path),
        _integer(offset),
        _integer(length),
        **_known(_StorageInfo, transform_descriptors=transforms),
    )


def _storage_meta(value: Any) -> Any:
    from torch.distributed.checkpoint.metadata import StorageMeta

    state = {} if value is None else _state(value, f"{_MODULE}.StorageMeta")
    modules = [_text(module) for module in _items(state.get("modules", []))]
    texts = {key: _optional_text(state.get(key)) for key in ("checkpoint_id", "save_id", "load_id")}
    return StorageMeta(**_known(StorageMeta, modules=modules, **texts))


def _planner_data(value: Any) -> Any:
    """Returns the position of each flat name in the saved tree."""
    if not isinstance(value, Mapping):
        return None
    return {_text(name): tuple(map(_key, _items(path))) for name, path in value.items()}


# Parsers of single values; each returns one type or raises.


def _state(value: Any, kind: str) -> dict[str, Any]:
    """Returns the attributes of an object of the given class."""
    _check_kind(value, kind)
    found: dict[str, Any] = {}
    for part in value.parts:
        for attributes in part if isinstance(part, tuple) else (part,):
            if isinstance(attributes, dict):
                found.update(dict.items(attributes))
    return found


def _check_kind(value: Any, kind: str) -> None:
    if not isinstance(value, StandIn) or value.qualified_name != kind:
        raise _damaged(value)


def _damaged(value: Any) -> DamagedFile:
    return DamagedFile(
        f"damaged: it has {kind_of(value)} where torch.distributed.checkpoint writes something else"
    )


def _known(kind: Any, **values: Any) -> dict[str, Any]:
    """Returns the arguments that this release of torch supports."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _damaged(value)
    return value


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _damaged(value)
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _damaged(value)
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _key(value: Any) -> str | int:
    return value if isinstance(value, str) else _integer(value)


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise _damaged(value)
    return value


def _size(value: Any) -> torch.Size:
    return torch.Size(map(_integer, _items(value)))
