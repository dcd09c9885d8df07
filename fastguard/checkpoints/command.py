"""Which checkpoints are good, and going back to one.

  fastguard ckpt list PATH...      what is there: step, epoch, metric, verdict
  fastguard ckpt verify PATH...    read everything: checksums, and NaN or Inf by tensor
  fastguard ckpt rollback PATH     make the last good one the one to resume from

PATH is the directory of a CheckpointStore, any .pt, .pth, .ckpt or .safetensors file, or a folder
of such files. Nothing in a file is executed. What a rollback replaces is kept beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastguard.checkpoints import foreign
from fastguard.checkpoints.errors import CheckpointError, StoreLocked
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.inspection import inspect
from fastguard.checkpoints.looking import not_ignored
from fastguard.checkpoints.store import CheckpointStore
from fastguard.checkpoints.table import print_table
from fastguard.checkpoints.view import Which
from fastguard.errors import Culprit, describe_culprits
from fastguard.usage import UsageError

FINE, FOUND_BAD = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", metavar="list|verify|rollback", parser_class=argparse.ArgumentParser
    )
    listing = actions.add_parser("list", help="what is there")
    verify = actions.add_parser("verify", help="read everything; exit status 1 if anything is bad")
    rollback = actions.add_parser("rollback", help="go back to the last good checkpoint")
    for action in (listing, verify):
        action.add_argument(
            "paths", nargs="+", type=Path, metavar="PATH", help="store, file, folder"
        )
    rollback.add_argument(
        "path", type=Path, metavar="PATH", help="store, file, or folder with a last.pt"
    )
    rollback.add_argument(
        "--to",
        metavar="WHICH",
        help="in a store: a step, best or last-clean (default); else the file to copy "
        "(default: the latest good one beside it)",
    )
    for action in (verify, rollback):
        action.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="PATTERN",
            help='tensors that are non-finite by design, such as "*.attn_mask"; may be repeated',
        )


def run(args: argparse.Namespace) -> int:
    if args.action is None:
        raise UsageError("ckpt needs an action: list, verify or rollback")
    try:
        if args.action == "rollback":
            return _rollback(_existing(args.path), args.to, args.ignore)
        paths = [_existing(path) for path in args.paths]
        if args.action == "list":
            return max(_list(path) for path in paths)
        return max(_verify(path, args.ignore) for path in paths)
    except StoreLocked as error:
        raise UsageError(str(error)) from None
    except CheckpointError as error:
        print(f"fastguard ckpt: {error}", file=sys.stderr)
        return FOUND_BAD


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = foreign.checkpoint_files(path)
    if not found:
        raise UsageError(f"{path} holds no checkpoints; give a store, a file, or a folder of files")
    return found


# list


def _list(path: Path) -> int:
    if path.is_dir() and is_store(path):
        _list_store(path)
    else:
        return _list_files(_files(path))
    return FINE


def _list_store(path: Path) -> None:
    with CheckpointStore(path, read_only=True) as store:
        entries = store.list()
        marks = {"last": store.last(), "last-clean": store.last_clean(), "best": store.best()}
        rows = []
        for entry in (*entries, *store.replaced()):
            verdict = "clean" if entry.clean else "damaged" if entry.finite else "NOT FINITE"
            named = [name for name, marked in marks.items() if marked == entry]
            rows.append(
                [
                    str(entry.step),
                    _text(entry.epoch),
                    _text(entry.metric),
                    _text(entry.tag),
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
    print_table(heads, rows)


def _list_files(paths: Sequence[Path]) -> int:
    """The files that cannot be read have their row, and a line that says why."""
    rows, unreadable = [], []
    for path in paths:
        found = foreign.describe(path)
        if found.problem is not None:
            unreadable.append(f"BAD  {path}: {found.problem}")
        modified = datetime.fromtimestamp(found.modified, UTC)
        rows.append(
            [
                str(path),
                _text(found.epoch),
                _text(found.step),
                _text(found.metric),
                f"{modified:%Y-%m-%d %H:%M:%S}",
                _size(found.size),
                str(found.n_tensors) if found.problem is None else "",
                "yes" if found.resumable else "no",
                found.format,
            ]
        )
    print_table(
        ["file", "epoch", "step", "metric", "time (UTC)", "size", "tensors", "optimizer", "format"],
        rows,
    )
    for line in unreadable:
        print(line)
    return FOUND_BAD if unreadable else FINE


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


# verify


def _verify(path: Path, ignore: Sequence[str]) -> int:
    if path.is_dir() and is_store(path):
        return _verify_store(path, ignore)
    return max(_verify_file(file, ignore) for file in _files(path))


def _verify_store(path: Path, ignore: Sequence[str]) -> int:
    status = FINE
    with CheckpointStore(path, read_only=True) as store:
        for check in store.verify():
            entry = check.entry
            bad = not_ignored(entry.bad, ignore)
            status = max(status, _report(path / entry.file, check.problem, bad, entry.n_tensors))
    return status


def _verify_file(path: Path, ignore: Sequence[str]) -> int:
    try:
        found = inspect(path)
    except (CheckpointError, OSError) as error:
        return _report(path, foreign.problem_of(path, error), (), 0)
    problem = f"{', '.join(found.damaged)} changed after it was written" if found.damaged else None
    return _report(path, problem, not_ignored(found.bad, ignore), found.contents.n_tensors)


def _report(path: Path, problem: str | None, bad: Sequence[Culprit], n_tensors: int) -> int:
    if problem is None and not bad:
        told = f"{n_tensors} tensors, all finite" if n_tensors else foreign.NO_TENSORS
        print(f"ok   {path}: {told}")
        return FINE
    if problem is not None:
        print(f"BAD  {path}: {problem}")
    if bad:
        print(f"BAD  {path}: {len(bad)} of {n_tensors} tensors are not finite")
    for culprit in bad:
        print(f"       {describe_culprits([culprit])}")
    return FOUND_BAD


# rollback


def _rollback(path: Path, to: str | None, ignore: Sequence[str]) -> int:
    if path.is_dir() and is_store(path):
        return _rollback_store(path, to)
    target = path if path.is_file() else _resumed_from(path)
    if to is None:
        source, passed_over = foreign.good_source(target, ignore)
        for line in passed_over:
            print(f"passed over {line}")
        if source is None:
            print(f"fastguard ckpt: no good checkpoint beside {target}", file=sys.stderr)
            return FOUND_BAD
    else:
        source = _existing(Path(to))
    before, after = foreign.describe(target), foreign.describe(source)
    was_good = to is None and foreign.is_sound(target, ignore)
    backup = foreign.roll_back_file(target, source, ignore=ignore)
    print(f"{target}{_where(before)} is now a copy of {source}{_where(after)}")
    print(f"what it was is kept in {backup}")
    if was_good:
        print(f"note: that was whole and finite itself; to undo: --to {backup}")
    if not after.resumable:
        print("note: it holds no optimizer state, so the optimizer will start afresh")
    return FINE


def _rollback_store(path: Path, to: str | None) -> int:
    which: Which = "last-clean"
    if to is not None:
        if not to.isdecimal() and to not in ("last", "last-clean", "best"):
            raise UsageError(
                f"--to {to!r} is no checkpoint of a store; use a step, best, last-clean"
            )
        which = int(to) if to.isdecimal() else to  # type: ignore[assignment]
    with CheckpointStore(path) as store:
        before = store.list()
        target = store.rollback(which)
        for entry in before:
            if entry not in store.list() and entry.serial > target.serial:
                print(f"put aside {entry}")
        print(f"training resumes after {target}")
    return FINE


def _resumed_from(folder: Path) -> Path:
    for path in (folder / "last.pt", folder / "weights" / "last.pt", folder / "last.ckpt"):
        if path.is_file():
            return path
    raise UsageError(f"{folder} is no store and has no last.pt; name the file to roll back")


def _where(found: foreign.Description) -> str:
    known = {"epoch": found.epoch, "step": found.step, "metric": found.metric}
    told = ", ".join(f"{name} {_text(value)}" for name, value in known.items() if value is not None)
    return f" ({told})" if told else ""
