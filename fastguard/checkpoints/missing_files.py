"""Finds files missing from a checkpoint, by file names and the `.metadata` of shards.

After an interrupted download or copy every file may be intact while the checkpoint is incomplete.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from fastguard.checkpoints.errors import CheckpointError
from fastguard.checkpoints.index_files import is_index
from fastguard.checkpoints.sharded.metadata import NAME as METADATA
from fastguard.checkpoints.sharded.metadata import read_metadata
from fastguard.errors import several

SHOWN = 3
_PART = re.compile(r"(.*?)(\d{1,9})([-_.]of[-_.])(\d{1,9})(\D.*)", re.IGNORECASE)
_SHARD = re.compile(r"__(\d{1,9})_\d{1,9}\.distcp")


def missing_parts(names: Iterable[str]) -> Iterator[str]:
    """Yields what is missing from models in numbered files that no index lists.

    Args:
        names: The checkpoint files and indexes of one folder.

    Example:
        >>> list(missing_parts(["model-00001-of-00003.safetensors"]))
        ['model-NNNNN-of-00003.safetensors: 2 of its 3 files are missing: 00002, 00003']
    """
    names = list(names)
    indexes = [name for name in names if is_index(Path(name))]
    models: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        if part := _PART.fullmatch(name):
            stem, number, between, total, ending = part.groups()
            models.setdefault((stem, between, total, ending), {})[int(number)] = number
    for (stem, between, total, ending), there in models.items():
        n, width = int(total), len(next(iter(there.values())))
        base = stem.rstrip("-_.")
        if len(there) >= n or any(index.startswith(base + ".") for index in indexes):
            continue
        first = 0 if 0 in there else 1
        lacking = (f"{i:0{width}}" for i in range(first, first + n) if i not in there)
        n_lacking = n - len(there)
        yield (
            f"{stem}{'N' * width}{between}{total}{ending}: {n_lacking} of its {n} files "
            f"{'is' if n_lacking == 1 else 'are'} missing: "
            f"{several(list(islice(lacking, SHOWN)), SHOWN, n_lacking)}"
        )


def missing_shards(folder: Path) -> str | None:
    """Returns what is missing from a folder written by `torch.distributed.checkpoint`, or None.

    Args:
        folder: A folder with `.metadata` or files named `__RANK_N.distcp`.
    """
    names = set(os.listdir(folder))
    try:
        places = read_metadata(folder).storage_data.values()
        wanted = {os.path.basename(place.relative_path) for place in places}
    except FileNotFoundError:
        ranks = {int(found[1]) for name in names if (found := _SHARD.fullmatch(name))}
        gaps = [rank for rank in range(min(max(ranks, default=-1), 10**4)) if rank not in ranks]
        others = f"; so are the files of rank {several(list(map(str, gaps)))}" if gaps else ""
        return f"{METADATA} is missing, without which no shard can be read{others}"
    except (CheckpointError, OSError) as error:
        return str(error)
    lacking = sorted(wanted - names)
    if not lacking:
        return None
    are = "is" if len(lacking) == 1 else "are"
    return f"{len(lacking)} of {len(wanted)} files {are} missing: {several(lacking)}"
