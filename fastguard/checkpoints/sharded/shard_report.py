"""Reads a whole folder of shards; finds non-finite tensors and computes the checksum.

Each rank reads a part of the files, and the results are combined on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguard.checkpoints.errors import CheckpointError, DamagedFile, UnsafeFile
from fastguard.checkpoints.reading.contents import read_shards
from fastguard.checkpoints.reading.file_report import (
    FileReport,
    check_loadable,
    own_name,
    report_on_file,
)
from fastguard.checkpoints.reading.inspect_file import read_through, sha256_of_open
from fastguard.checkpoints.sharded import metadata as shard_metadata
from fastguard.checkpoints.sharded.metadata import read_metadata
from fastguard.checkpoints.sharded.open_files import OpenFiles
from fastguard.ranks.lockstep import Peers
from fastguard.records.regular_files import open_regular


def rest_name(rank: int) -> str:
    """Returns the name of the file with the values that a rank does not share with others."""
    return f"rest-{rank}.pt" if rank else "rest.pt"


def report_on(folder: Path, peers: Peers, *, crc32: bool = True) -> FileReport:
    """Reads a folder once; each rank reads a part of its files.

    Args:
        folder: The folder.
        peers: The ranks.
        crc32: See `report_on_file`.

    Raises:
        DamagedFile: A file is missing or incomplete.
        OSError: The file cannot be read.
    """
    names = peers.first(OpenFiles(folder).names)
    share = names[peers.rank :: peers.size]
    mine = peers.together(lambda: _report_on_share(folder, names, share, crc32))
    reports = {name: report for part in peers.gather(mine) for name, report in part.items()}
    bad: dict[str, list[int]] = {}
    for name in names:
        for culprit, *counts in reports[name].bad:
            so_far = bad.get(culprit, [0, 0, 0])
            bad[culprit] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return FileReport(
        header=reports[rest_name(0)].header,
        sha256=_digest({name: report.sha256 for name, report in reports.items()}),
        size=sum(report.size for report in reports.values()),
        tensors=frozenset().union(*(report.tensors for report in reports.values())),
        bad=tuple((name, *counts) for name, counts in bad.items()),  # type: ignore[misc]
    )


def _report_on_share(
    folder: Path, names: Sequence[str], share: Sequence[str], crc32: bool
) -> dict[str, FileReport]:
    try:
        metadata = read_metadata(folder)
        places = metadata.storage_data.items()
        wanted = {rest_name(0), *(_file_of(folder, place) for _, place in places)}
        for missing in sorted(wanted - set(names)):
            raise DamagedFile(f"{folder / missing} is missing")
        reports = {}
        for name in share:
            if name.startswith("rest"):
                reports[name] = report_on_file(folder / name, crc32=crc32)
            else:
                shards = [(index, place) for index, place in places if place.relative_path == name]
                reports[name] = _report_on_shards(folder / name, shards, crc32)
        return reports
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename} is missing") from None
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # raised by torch, or invalid names and numbers
        raise DamagedFile(f"{folder} is damaged ({error})") from None


def _report_on_shards(path: Path, shards: Sequence[tuple[Any, Any]], crc32: bool) -> FileReport:
    """Reads a file with any number of shards, in pieces."""
    with open_regular(path, follow_links=False) as file:
        contents = read_shards(file, path, [(place.offset, place.length) for _, place in shards])
        check_loadable(path, contents)
        found = read_through(file, contents, sha256=True, crc32=crc32)

    def shard_of(name: str) -> str:
        index, _ = shards[int(name.partition("/")[0])]
        return own_name(index.fqn.partition("@")[0])

    if found.damaged:
        names = ", ".join(dict.fromkeys(map(shard_of, found.damaged)))
        raise DamagedFile(f"{path}: {names} changed after the file was written")
    bad = tuple((shard_of(name), *counts) for name, *counts in found.bad)
    return FileReport(None, found.sha256 or "", found.size, frozenset(), bad)  # type: ignore[arg-type]


def _file_of(folder: Path, place: Any) -> str:
    name = Path(place.relative_path)
    if name.name != place.relative_path:
        raise UnsafeFile(f"{folder / shard_metadata.NAME} points to {name}, outside its folder")
    return name.name


def listing(files: OpenFiles, peers: Peers) -> str:
    """Returns the SHA-256 of the output of `sha256sum * .metadata` in a folder.

    Afterward, `files` on every rank opens only the hashed files.
    """
    names = peers.first(files.names)

    def hashed() -> dict[str, str]:
        found = {}
        for name in names[peers.rank :: peers.size]:
            with files.open(name) as file:
                found[name] = sha256_of_open(file)
        return found

    mine = peers.together(hashed)
    everyone = peers.gather({n: (sha256, files.identity(n)) for n, sha256 in mine.items()})
    found = {name: hashes for share in everyone for name, hashes in share.items()}
    files.expect({name: identity for name, (_, identity) in found.items()})
    return _digest({name: sha256 for name, (sha256, _) in found.items()})


def _digest(sha256: Mapping[str, str]) -> str:
    lines = "".join(f"{sha256[name]}  {name}\n" for name in sorted(sha256))
    return hashlib.sha256(lines.encode()).hexdigest()
