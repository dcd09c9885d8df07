"""Finds checkpoint files below a folder, by name, and `.bin` files by their first bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints import names
from fastguard.checkpoints.errors import CheckpointError
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.index_files import is_index
from fastguard.checkpoints.missing_files import missing_parts
from fastguard.errors import several
from fastguard.records.regular_files import open_regular

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
SHOWN = 5
_SETTINGS = "training_args.bin"  # pickled settings of the Hugging Face Trainer
_BEGINNINGS = (b"PK", b"\x80", b"\0\0")  # an archive, a pickle, and zeros after a lost write


@dataclass(frozen=True, slots=True)
class Found:
    """A path below a folder that `verify` has to report on.

    Attributes:
        path: The file or folder.
        kind: `"shards"` for a folder written by `torch.distributed.checkpoint`, `"index"` for a
            file that maps tensors to files, `"incomplete"` for a folder with missing model files,
            `"other"` for a file that only has the name of a checkpoint, and `"unreadable"` for a
            folder that cannot be read.
        why: The reason, for the last three kinds.
    """

    path: Path
    kind: Literal["file", "index", "store", "shards", "incomplete", "other", "unreadable"]
    why: str = ""


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the checkpoint files in a folder, by name, including dangling links and pipes."""
    return [found.path for found in _files(folder) if found.kind == "file"]


def is_shards(folder: Path) -> bool:
    """Whether a folder is one sharded checkpoint, complete or not, from a store or from torch."""
    if is_of_a_store(folder) or any(name.endswith(".distcp") for name in os.listdir(folder)):
        return True
    try:  # other programs use this file name too, but torch's file is a pickle
        with open_regular(folder / ".metadata") as file:
            return file.read(1) == b"\x80"
    except OSError:
        return False


def is_of_a_store(folder: Path) -> bool:
    """Whether a folder is named like a checkpoint of a store."""
    return names.FOLDER in folder.resolve().name


def how_to_read_shards(folder: Path) -> str:
    """Returns advice on a folder of shards, phrased to follow its name."""
    if is_of_a_store(folder):
        return f"is one checkpoint of a store; pass the store instead: {folder.resolve().parent}"
    return (
        "was written by torch.distributed.checkpoint, whose shards cannot be read here; convert "
        "the folder to one file (python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{folder} whole.pt, or dcp_to_torch_save) and verify that file, or save with "
        "fastguard.CheckpointStore, which verifies its shards"
    )


def walk(folder: Path) -> Iterator[Found]:
    """Yields everything in a folder and its subfolders, by name.

    Files inside a store are not listed. Hidden folders and links to folders are not entered.
    """
    failed: list[OSError] = []
    for name, below, _ in os.walk(folder, onerror=failed.append):
        at = Path(name)
        below[:] = sorted(d for d in below if not d.startswith(".") and names.FOLDER not in d)
        try:
            yield from _in(at)
        except (CheckpointError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else None
            yield Found(at, "unreadable", why or str(error))
            below.clear()
    for error in failed:
        yield Found(Path(error.filename), "unreadable", error.strerror or str(error))


def folders_of_checkpoints(folder: Path) -> list[Path]:
    """Returns the subfolders that contain checkpoints."""
    holders = [f.path if f.path.is_dir() else f.path.parent for f in walk(folder)]
    return [path for path in dict.fromkeys(holders) if path != folder]


def where_else(folder: Path) -> str:
    """Returns advice on a folder without checkpoints, phrased to follow its name."""
    below = folders_of_checkpoints(folder)
    if not below:
        return "holds no checkpoints; pass a store, a file, or a folder of files"
    listed = several([str(path) for path in below], SHOWN)
    return f"holds no checkpoints itself; these subfolders do: {listed}"


def _in(folder: Path) -> Iterator[Found]:
    if is_store(folder):
        yield Found(folder, "store")
        return
    if is_shards(folder):
        yield Found(folder, "shards")
    files = list(_files(folder))
    yield from files
    for problem in missing_parts(found.path.name for found in files):
        yield Found(folder, "incomplete", problem)


def _files(folder: Path) -> Iterator[Found]:
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if is_index(path) and not path.is_dir():
            yield Found(path, "index")
        if not name.endswith(ENDINGS) or name.startswith(files.TEMPORARY):
            continue
        if path.is_dir():
            continue
        why = _no_checkpoint(path) if name.endswith(".bin") else None
        yield Found(path, "file" if why is None else "other", why or "")


def _no_checkpoint(path: Path) -> str | None:
    """Returns why a `.bin` file, which may also be data or a program, is not a checkpoint."""
    if path.name == _SETTINGS:
        return "settings of the Hugging Face Trainer"
    try:
        with open_regular(path) as file:
            first = file.read(2)
    except OSError:  # reported when the file is read
        return None
    if not first or first.startswith(_BEGINNINGS):
        return None
    return "does not begin like a torch file"
