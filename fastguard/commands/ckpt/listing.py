"""`fastguard ckpt list`: tables of the checkpoints of a store, a folder or a file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastguard.checkpoints import find_files as finding
from fastguard.checkpoints import foreign_files as foreign
from fastguard.checkpoints.entry import to_json
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.index_files import check_index, is_index
from fastguard.checkpoints.store import CheckpointStore
from fastguard.commands.ckpt.answer import Answer
from fastguard.commands.terminal import text_of
from fastguard.commands.usage import FINE, FOUND_BAD, UsageError


def list_checkpoints(path: Path, answer: Answer) -> int:
    """Lists a store, the files in a folder or index, or one file; returns the exit status."""
    if not (path.is_dir() and is_store(path)):
        return _list_files(_files_in(path), answer)
    _list_store(path, answer)
    return FINE


def _files_in(folder: Path) -> Sequence[Path]:
    """The files to list for a folder, an index, or a single file."""
    if not folder.is_dir():
        return check_index(folder).files if is_index(folder) else [folder]
    found = finding.checkpoint_files(folder)
    if not found:
        if finding.is_shards(folder):
            raise UsageError(f"{folder} {finding.how_to_read_shards(folder)}")
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    return found


def _list_store(path: Path, answer: Answer) -> None:
    with CheckpointStore(path, read_only=True) as store:
        entries = store.list()
        marks = {"last": store.last(), "last-clean": store.last_clean(), "best": store.best()}
        rows, facts = [], []
        for entry in (*entries, *store.replaced()):
            verdict = "clean" if entry.clean else "damaged" if entry.finite else "NOT FINITE"
            named = [name for name, marked in marks.items() if marked == entry]
            known = to_json(entry) | {"path": str(path / entry.file), "verdict": verdict.lower()}
            facts.append({**known, "marks": named, "replaced": entry not in entries})
            rows.append(
                [
                    str(entry.step),
                    text_of(entry.epoch),
                    text_of(entry.metric),
                    text_of(entry.tag),
                    entry.time[:19].replace("T", " "),
                    _size(entry.size),
                    str(entry.incidents),
                    verdict,
                    ", ".join(named) if entry in entries else "replaced",
                    entry.file,
                ]
            )
    heads = [
        "step",
        "epoch",
        "metric",
        "tag",
        "time (UTC)",
        "size",
        "incidents",
        "verdict",
        "",
        "file",
    ]
    answer.table(heads, rows, facts)


def _list_files(paths: Sequence[Path], answer: Answer) -> int:
    """Lists files; an unreadable file gets a row and a line with the reason."""
    rows, facts, unreadable = [], [], []
    for path in paths:
        found = foreign.describe(path)
        if found.problem is not None:
            unreadable.append(f"BAD  {path}: {found.problem}")
        facts.append(
            {
                "path": str(path),
                "epoch": found.epoch,
                "step": found.step,
                "metric": found.metric,
                "modified": found.modified,
                "size": found.size,
                "tensors": found.n_tensors,
                "resumable": found.resumable,
                "format": found.format,
                "problem": found.problem,
            }
        )
        rows.append(
            [
                str(path),
                text_of(found.epoch),
                text_of(found.step),
                text_of(found.metric),
                _time(found.modified),
                _size(found.size),
                str(found.n_tensors) if found.problem is None else "",
                "yes" if found.resumable else "no",
                found.format,
            ]
        )
    answer.table(
        ["file", "epoch", "step", "metric", "time (UTC)", "size", "tensors", "optimizer", "format"],
        rows,
        facts,
    )
    for line in unreadable:
        answer.say(line)
    return FOUND_BAD if unreadable else FINE


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # file systems may report a time out of range
        return "-"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"
