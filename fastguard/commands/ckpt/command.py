"""Which checkpoints are good, and going back to one.

  fastguard ckpt list PATH...      what is there: step, epoch, metric, verdict
  fastguard ckpt verify PATH...    read everything: checksums, and NaN or Inf by tensor
  fastguard ckpt rollback PATH     make the last good one the one to resume from

PATH is the directory of a CheckpointStore, a .pt, .pth, .ckpt, .bin or .safetensors file, or a
folder of such files; verify goes through its subfolders too. Nothing in a file is executed. What a
rollback replaces is kept beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastguard.checkpoints import find_files as finding
from fastguard.checkpoints import foreign_files as foreign
from fastguard.checkpoints.errors import CheckpointError, StoreLocked
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.index_files import check_index, is_index
from fastguard.checkpoints.missing_files import missing_parts, missing_shards
from fastguard.checkpoints.reading.file_report import nan_numbers, not_ignored
from fastguard.checkpoints.reading.inspect_file import inspect
from fastguard.checkpoints.reading.weights_only import refused_names
from fastguard.checkpoints.store import CheckpointStore
from fastguard.commands.ckpt import rollback as going_back
from fastguard.commands.terminal import print_table, say, text_of
from fastguard.commands.usage import UsageError
from fastguard.errors import Culprit, describe_culprits

FINE, FOUND_BAD = 0, 1
SHOWN = 3


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
            return going_back.run(_existing(args.path), args.to, args.ignore)
        paths = [_existing(path) for path in args.paths]
        if args.action == "list":
            return max(_list(path) for path in paths)
        return max(_verify(path, args.ignore) for path in paths)
    except StoreLocked as error:
        who, _, _ = str(error).rpartition(";")  # what to do is said to programs there
        raise UsageError(f"{who}; end that run first; list and verify work meanwhile") from None
    except CheckpointError as error:
        say(f"fastguard ckpt: {error}", file=sys.stderr)
        return FOUND_BAD


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path


# list


def _list(path: Path) -> int:
    if path.is_dir() and is_store(path):
        _list_store(path)
    else:
        return _list_files(_files_in(path))
    return FINE


def _files_in(folder: Path) -> Sequence[Path]:
    """The files to list for a folder, an index, or a file, which stands for itself."""
    if not folder.is_dir():
        return check_index(folder).files if is_index(folder) else [folder]
    found = finding.checkpoint_files(folder)
    if not found:
        if finding.is_shards(folder):
            raise UsageError(f"{folder} {finding.how_to_read_shards(folder)}")
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    return found


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
    print_table(heads, rows)


def _list_files(paths: Sequence[Path]) -> int:
    """The files that cannot be read have their row, and a line that says why."""
    rows, unreadable = [], []
    for path in paths:
        found = foreign.describe(path)
        if found.problem is not None:
            unreadable.append(f"BAD  {path}: {found.problem}")
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
    print_table(
        ["file", "epoch", "step", "metric", "time (UTC)", "size", "tensors", "optimizer", "format"],
        rows,
    )
    for line in unreadable:
        say(line)
    return FOUND_BAD if unreadable else FINE


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # a file system may give it any
        return "-"


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
    if path.is_dir():
        return _verify_folder(path, ignore)
    if is_index(path):
        return _verify_index(path, ignore, with_files=True)
    if path.suffix != ".distcp" and any(missing_parts([path.name])):
        say(f"note: {path} is one file of several; the others: verify {path.parent}")
    kind = "shards" if path.suffix == ".distcp" else "file"
    return _verify_found(finding.Found(path.parent if kind == "shards" else path, kind), ignore)


def _verify_folder(folder: Path, ignore: Sequence[str]) -> int:
    """Everything below the folder; what cannot be read is a row of its own."""
    status = None
    for found in finding.walk(folder):
        if found.kind == "other":
            say(f"skip {found.path}: {found.why}")
            continue
        status = max(status or FINE, _verify_found(found, ignore))
    if status is None:
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    return status


def _verify_found(found: finding.Found, ignore: Sequence[str]) -> int:
    if found.kind == "file":
        return _verify_file(found.path, ignore)
    if found.kind == "index":
        return _verify_index(found.path, ignore, with_files=False)
    if found.kind == "incomplete":
        return _report(found.path, found.why, (), 0)
    if found.kind == "shards":  # nothing is known of them, so not everything is fine
        if not finding.is_of_a_store(found.path) and (lacking := missing_shards(found.path)):
            return _report(found.path, lacking, (), 0)
        say(f"skip {found.path}: {finding.how_to_read_shards(found.path)}")
        return FOUND_BAD
    if found.kind == "unreadable":
        return _report(found.path, f"cannot be read: {found.why}", (), 0)
    try:
        return _verify_store(found.path, ignore)
    except (CheckpointError, OSError) as error:
        return _report(found.path, foreign.problem_of(found.path, error), (), 0)


def _verify_store(path: Path, ignore: Sequence[str]) -> int:
    status = FINE
    with CheckpointStore(path, read_only=True) as store:
        for check in store.verify():
            entry = check.entry
            bad = not_ignored(entry.bad, ignore)
            file = path / entry.file
            problem = check.problem and foreign.without_name(file, check.problem)
            n_ignored = len(entry.bad) - len(bad)
            status = max(status, _report(file, problem, bad, entry.n_tensors, n_ignored=n_ignored))
    return status


def _verify_file(path: Path, ignore: Sequence[str]) -> int:
    try:
        found = inspect(path)
    except (CheckpointError, OSError) as error:
        return _report(path, foreign.problem_of(path, error), (), 0)
    problem = f"{', '.join(found.damaged)} changed after it was written" if found.damaged else None
    bad = not_ignored(found.bad, ignore)
    meant = [(culprit, what) for culprit, what in found.meant if not_ignored([culprit], ignore)]
    unread = found.contents.unread
    status = _report(
        path,
        problem,
        bad,
        found.contents.n_tensors,
        n_meant=len(meant),
        n_ignored=len(found.bad) + len(found.meant) - len(bad) - len(meant),
        n_unread=len(unread),
    )
    for what in dict.fromkeys(what for _, what in meant):
        culprits = [culprit for culprit, other in meant if other == what]
        say(f"       note: {what}: {describe_culprits(culprits)}")
    if nan := not_ignored(nan_numbers(found.contents.tree), ignore):
        more = f" and {len(nan) - SHOWN} more" if len(nan) > SHOWN else ""
        names = ", ".join(name for name, *_ in nan[:SHOWN])
        say(f"       note: numbers beside the tensors that are NaN: {names}{more}")
    for name, what in unread[:SHOWN]:
        say(f"       note: {name} was not read: {what}")
    if refused := refused_names(found.contents.names):
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        say(
            f"       note: torch.load(weights_only=True) refuses it: {', '.join(refused[:SHOWN])}"
            f"{more}; load it otherwise only if you trust who wrote it"
        )
    return status


def _verify_index(path: Path, ignore: Sequence[str], *, with_files: bool) -> int:
    """An index, and where nothing else leads to them the files that it names."""
    try:
        found = check_index(path)
    except (CheckpointError, OSError) as error:
        return _report(path, foreign.problem_of(path, error), (), 0)
    for problem in found.problems:
        say(f"BAD  {path}: {problem}")
    if not found.problems:
        say(f"ok   {path}: {found.n_tensors} tensors, each in the file that it names")
    status = FOUND_BAD if found.problems else FINE
    return max([status, *(_verify_file(file, ignore) for file in found.files if with_files)])


def _report(
    path: Path,
    problem: str | None,
    bad: Sequence[Culprit],
    n_tensors: int,
    *,
    n_meant: int = 0,
    n_ignored: int = 0,
    n_unread: int = 0,
) -> int:
    """Prints what one file is; the exit status.

    Args:
        path: The file.
        problem: Why it is no whole checkpoint, if it is not.
        bad: The tensors that are not finite, and should be.
        n_tensors: All that were read.
        n_meant: How many are infinite by design.
        n_ignored: How many are not finite, and excused by `--ignore`.
        n_unread: How many others there are.
    """
    if problem is not None:
        say(f"BAD  {path}: {problem}")
    if bad:
        are = "is" if len(bad) == 1 else "are"
        say(f"BAD  {path}: {len(bad)} of {n_tensors} tensors {are} not finite")
    for culprit in bad:
        say(f"       {describe_culprits([culprit])}")
    if bad:
        say('       (--ignore PATTERN passes over tensors that may be so, as "*.attn_mask")')
    if bad or problem is not None:
        return FOUND_BAD
    told = foreign.NO_TENSORS
    if n_tensors:
        tensors = "1 tensor" if n_tensors == 1 else f"{n_tensors} tensors"
        excepted = [f"{n_meant} by design"] * bool(n_meant) + [f"{n_ignored} ignored"] * bool(
            n_ignored
        )
        told = f"{tensors}, {'finite' if excepted or n_unread else 'all finite'}"
        told += f" except {' and '.join(excepted)}" if excepted else ""
    told += f"; {n_unread} more not read" if n_unread else ""
    say(f"ok   {path}: {told}")
    return FINE
