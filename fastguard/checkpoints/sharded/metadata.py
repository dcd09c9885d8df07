"""`.metadata` of `torch.distributed.checkpoint`, a pickle, read with the classes it consists of."""

from __future__ import annotations

import dataclasses
import enum
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.reading.inert_calls import MOVED
from fastguard.regular_files import open_regular

NAME = ".metadata"
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


def read_metadata(folder: Path) -> Any:
    """The `Metadata` of a folder that `torch.distributed.checkpoint` wrote.

    Raises:
        UnsafeFile: It asks for anything else; nothing was executed.
        DamagedFile: It is no such pickle.
        OSError: It cannot be read.
    """
    with open_regular(folder / NAME, follow_links=False) as file:
        return metadata_in(file, folder)


def metadata_in(file: BinaryIO, folder: Path) -> Any:
    """`read_metadata`, of a file that is open."""
    try:
        return _Unpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise DamagedFile(f"{folder / NAME} cannot be read ({error})") from None


class _Unpickler(pickle._Unpickler):
    """The one in Python, as torch takes for `weights_only=True`: BUILD of the one in C obeys.

    It gives attributes to whatever it is told to, such as a class of this process.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def _build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        # Those that the pickle made itself; members of an enum are everybody's, as classes are.
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise UnsafeFile(f"the metadata gives a state to {target!r}; nothing was changed")
        self.load_build()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = _build

    def find_class(self, module: str, name: str) -> Any:
        module = MOVED.get(module, module)
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
