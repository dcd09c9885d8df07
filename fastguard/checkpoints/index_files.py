"""Checks models split into several files with a Hugging Face index.

`model.safetensors.index.json` maps each tensor name to the file that holds it. After an interrupted
download every file may be intact while the model is incomplete; only the index shows that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.reading.contents import read_contents
from fastguard.checkpoints.reading.safetensors_header import json_without_doubles
from fastguard.errors import several
from fastguard.records.regular_files import open_regular

_NAME = re.compile(r".+\.(safetensors|bin)\.index(\.[^.]+)?\.json", re.IGNORECASE)
_LARGEST = 100 * 2**20  # bytes; the limit for a safetensors header, which also lists every tensor


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """Result of comparing an index with the files beside it.

    Attributes:
        n_tensors: Number of tensors in the index.
        files: Files named by the index that exist, by name.
        problems: Missing or unreadable files and tensors, one line per problem.
    """

    n_tensors: int
    files: tuple[Path, ...]
    problems: tuple[str, ...]


def is_index(path: Path) -> bool:
    """Whether a file is named as an index: `model.safetensors.index.json`, `...bin.index.json`."""
    return _NAME.fullmatch(path.name) is not None


def check_index(path: Path) -> IndexCheck:
    """Compares an index with the headers of the files it names; reads no tensors.

    Raises:
        DamagedFile: The file is not an index, or names a file outside its folder.
        OSError: The file cannot be opened, or is not a regular file.
    """
    by_file: dict[str, list[str]] = {}
    places = _places(path)
    for tensor, file in places.items():
        by_file.setdefault(file, []).append(tensor)
    there, problems = [], []
    for file, tensors in sorted(by_file.items()):
        beside = path.parent / file
        if not beside.exists():
            problems.append(f"{file} is missing, with {several(tensors)}")
            continue
        there.append(beside)
        try:
            held = _names_in(beside)
        except (CheckpointError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            why = str(why).removeprefix(f"{beside}: ")
            problems.append(f"{file} cannot be read, with {several(tensors)}: {why}")
            continue
        lacking = [tensor for tensor in tensors if tensor not in held]
        if lacking:
            problems.append(f"{file} does not hold {several(lacking)}")
    return IndexCheck(len(places), tuple(there), tuple(problems))


def _places(path: Path) -> Mapping[str, str]:
    """Returns the file of each tensor."""
    with open_regular(path) as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise DamagedFile(f"{path}: the index is larger than {_LARGEST} bytes")
    try:
        places = json_without_doubles(raw).get("weight_map")
    except CheckpointError as error:
        raise DamagedFile(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not JSON ({error})") from None
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise DamagedFile(f"{path}: not an index: it has no weight_map from tensors to files")
    for file in places.values():
        if file in ("", ".", "..") or set(file) & {"/", "\\", "\0"}:
            raise DamagedFile(f"{path}: the index points to {file!r}, which is not in its folder")
    return places


def _names_in(path: Path) -> frozenset[str]:
    tree = read_contents(path).tree
    return frozenset(map(str, tree)) if isinstance(tree, dict) else frozenset()
