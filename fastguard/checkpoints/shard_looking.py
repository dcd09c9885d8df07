"""Reading a folder of shards from front to back: which are non-finite, and the checksum of it all.

Each rank reads a share of the files; what they found is put together on all of them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.buckets import bucketize
from fastguard.checkpoints import shard_metadata
from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.inspection import sha256_of
from fastguard.checkpoints.looking import Look, look_at_file, own_name
from fastguard.checkpoints.shard_metadata import read_metadata
from fastguard.errors import Culprit
from fastguard.measure import measure
from fastguard.peers import Peers


def rest_name(rank: int) -> str:
    """The file of what a rank does not share with the others."""
    return f"rest-{rank}.pt" if rank else "rest.pt"


def look(folder: Path, peers: Peers) -> Look:
    """Reads a folder once, each rank a share of its files.

    Raises:
        DamagedFile: A file is missing, or not whole.
        OSError: It cannot be read.
    """
    names = peers.first(lambda: _names(folder))
    mine = peers.together(lambda: _look_at_share(folder, names, names[peers.rank :: peers.size]))
    looks = {name: seen for share in peers.gather(mine) for name, seen in share.items()}
    bad: dict[str, list[int]] = {}
    for name in names:
        for culprit, *counts in looks[name].bad:
            so_far = bad.get(culprit, [0, 0, 0])
            bad[culprit] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return Look(
        header=looks[rest_name(0)].header,
        sha256=_digest({name: seen.sha256 for name, seen in looks.items()}),
        size=sum(seen.size for seen in looks.values()),
        tensors=frozenset().union(*(seen.tensors for seen in looks.values())),
        bad=tuple((name, *counts) for name, counts in bad.items()),  # type: ignore[misc]
    )


def _names(folder: Path) -> list[str]:
    """The files of a folder, in the order of `sha256sum *`."""
    return sorted(os.listdir(folder))


def _look_at_share(folder: Path, names: Sequence[str], share: Sequence[str]) -> dict[str, Look]:
    try:
        metadata = read_metadata(folder)
        places = metadata.storage_data.items()
        wanted = {rest_name(0), *(_file_of(folder, place) for _, place in places)}
        for missing in sorted(wanted - set(names)):
            raise DamagedFile(f"{folder / missing} is missing")
        looks = {}
        for name in share:
            if name.startswith("rest"):
                looks[name] = look_at_file(folder / name)
                continue
            here = [(index, place) for index, place in places if place.relative_path == name]
            size = (folder / name).stat().st_size
            sha256 = sha256_of(folder / name)
            looks[name] = Look(None, sha256, size, frozenset(), _nonfinite(folder, here))
        return looks
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename} is missing") from None
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # of torch, or names and numbers that make no sense
        raise DamagedFile(f"{folder} is damaged ({error})") from None


def _nonfinite(folder: Path, places: Iterable[tuple[Any, Any]]) -> tuple[Culprit, ...]:
    """The shards with NaN or Inf, one entry a shard. Holds one of them at a time."""
    bad: list[Culprit] = []
    for index, place in places:
        shard = _stored(folder, place)
        if shard.is_floating_point() or shard.is_complex():
            name = own_name(index.fqn.partition("@")[0])
            bad += [(name, *counts) for _, *counts in measure(bucketize([shard])).culprits()]  # type: ignore[misc]
    return tuple(bad)


def _file_of(folder: Path, place: Any) -> str:
    name = Path(place.relative_path)
    if name.name != place.relative_path:
        raise UnsafeFile(f"{folder / shard_metadata.NAME} points to {name}, outside its folder")
    return name.name


def _stored(folder: Path, place: Any) -> Tensor:
    name = _file_of(folder, place)
    with open(folder / name, "rb") as file:
        file.seek(place.offset)
        raw = file.read(place.length)
    if len(raw) != place.length:
        raise DamagedFile(f"truncated: {folder / name}")
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def listing(folder: Path, peers: Peers) -> tuple[str, int]:
    """The SHA-256 of what `sha256sum * .metadata` prints in the folder, and its size in bytes."""
    names = peers.first(lambda: _names(folder))

    def hashed() -> list[tuple[str, str, int]]:
        share = names[peers.rank :: peers.size]
        return [(n, sha256_of(folder / n), (folder / n).stat().st_size) for n in share]

    lines = [line for share in peers.gather(peers.together(hashed)) for line in share]
    return _digest({name: sha256 for name, sha256, _ in lines}), sum(size for *_, size in lines)


def _digest(sha256: Mapping[str, str]) -> str:
    lines = "".join(f"{sha256[name]}  {name}\n" for name in sorted(sha256))
    return hashlib.sha256(lines.encode()).hexdigest()
