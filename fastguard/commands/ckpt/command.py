"""Verifies checkpoints and rolls back to a good one.

PATH is the directory of a CheckpointStore, a .pt, .pth, .ckpt, .bin or .safetensors file, or a
folder of such files; verify includes subfolders. Files are never unpickled. A rollback keeps a copy
of the file that it replaces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastguard.checkpoints import find_files as finding
from fastguard.checkpoints import foreign_files as foreign
from fastguard.checkpoints.entry import to_json
from fastguard.checkpoints.errors import CheckpointError, StoreLocked
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.index_files import check_index, is_index
from fastguard.checkpoints.missing_files import missing_parts, missing_shards
from fastguard.checkpoints.reading.file_report import nan_numbers, not_ignored
from fastguard.checkpoints.reading.inspect_file import inspect
from fastguard.checkpoints.reading.weights_only import refused_names
from fastguard.checkpoints.store import CheckpointStore
from fastguard.commands.ckpt import rollback as rollback_action
from fastguard.commands.ckpt.answer import Answer
from fastguard.commands.parsing import Parser
from fastguard.commands.terminal import say, text_of
from fastguard.commands.usage import UsageError
from fastguard.errors import Culprit, describe_culprits

FINE, FOUND_BAD = 0, 1
SHOWN = 3
INDENT = " " * 7  # aligns with the path in verify's lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard ckpt`."""
    actions = parser.add_subparsers(
        dest="action", metavar="list|verify|rollback", parser_class=Parser
    )
    listing = actions.add_parser("list", help="list checkpoints: step, epoch, metric, verdict")
    verify = actions.add_parser(
        "verify", help="read everything: checksums, NaN and Inf; exit status 1 if anything is bad"
    )
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
        help="for a store: a step, best or last-clean (default); for a file: the file to copy "
        "(default: the latest good one in the same folder)",
    )
    for action in (listing, verify, rollback):
        action.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (verify, rollback):
        action.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="PATTERN",
            help='tensors that are non-finite by design, such as "*.attn_mask"; may be repeated',
        )


def run(args: argparse.Namespace) -> int:
    """Runs `fastguard ckpt`; returns the exit status."""
    if args.action is None:
        raise UsageError("ckpt needs an action: list, verify or rollback")
    answer = Answer(args.json)
    try:
        if args.action == "rollback":
            path = _existing(args.path)
            return answer.end(rollback_action.run(path, args.to, args.ignore, answer))
        paths = [_existing(path) for path in args.paths]
        if args.action == "list":
            return answer.end(max(_list(path, answer) for path in paths))
        return answer.end(max(_verify(path, args.ignore, answer) for path in paths))
    except StoreLocked as error:
        problem, _, _ = str(error).rpartition(";")  # the remedy after it is for Python code
        raise UsageError(f"{problem}; end that run first; list and verify work meanwhile") from None
    except CheckpointError as error:
        say(f"fastguard ckpt: {error}", file=sys.stderr)
        return FOUND_BAD


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path


# list


def _list(path: Path, answer: Answer) -> int:
    if path.is_dir() and is_store(path):
        _list_store(path, answer)
    else:
        return _list_files(_files_in(path), answer)
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
    except (ValueError, OverflowError, OSError):  # file systems may report any time
        return "-"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


# verify


def _verify(path: Path, ignore: Sequence[str], answer: Answer) -> int:
    if path.is_dir() and is_store(path):
        return _verify_store(path, ignore, answer)
    if path.is_dir():
        return _verify_folder(path, ignore, answer)
    if is_index(path):
        return _verify_index(path, ignore, answer, with_files=True)
    if path.suffix != ".distcp" and any(missing_parts([path.name])):
        answer.say(
            f"note: {path} is one file of several; to verify all of them: "
            f"fastguard ckpt verify {path.parent}"
        )
    kind = "shards" if path.suffix == ".distcp" else "file"
    return _verify_found(
        finding.Found(path.parent if kind == "shards" else path, kind), ignore, answer
    )


def _verify_folder(folder: Path, ignore: Sequence[str], answer: Answer) -> int:
    """Verifies everything below the folder; an unreadable file gets its own row."""
    status = None
    for found in finding.walk(folder):
        if found.kind == "other":
            answer.say(
                f"skip {found.path}: {found.why}",
                path=str(found.path),
                verdict="skipped",
                problem=found.why,
            )
            continue
        status = max(status or FINE, _verify_found(found, ignore, answer))
    if status is None:
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    return status


def _verify_found(found: finding.Found, ignore: Sequence[str], answer: Answer) -> int:
    if found.kind == "file":
        return _verify_file(found.path, ignore, answer)
    if found.kind == "index":
        return _verify_index(found.path, ignore, answer, with_files=False)
    if found.kind == "incomplete":
        return _report(answer, found.path, found.why, (), 0)
    if found.kind == "shards":  # not verified, so the exit status is not 0
        if not finding.is_of_a_store(found.path) and (lacking := missing_shards(found.path)):
            return _report(answer, found.path, lacking, (), 0)
        why = finding.how_to_read_shards(found.path)
        answer.say(
            f"skip {found.path}: {why}", path=str(found.path), verdict="skipped", problem=why
        )
        return FOUND_BAD
    if found.kind == "unreadable":
        return _report(answer, found.path, f"cannot be read: {found.why}", (), 0)
    try:
        return _verify_store(found.path, ignore, answer)
    except (CheckpointError, OSError) as error:
        return _report(answer, found.path, foreign.problem_of(found.path, error), (), 0)


def _verify_store(path: Path, ignore: Sequence[str], answer: Answer) -> int:
    status = FINE
    with CheckpointStore(path, read_only=True) as store:
        for name, why in store.unreadable().items():
            problem = foreign.without_name(path / name, why)
            status = _report(answer, path / name, problem, (), 0)
        for check in store.verify():
            entry = check.entry
            bad = not_ignored(entry.bad, ignore)
            file = path / entry.file
            problem = check.problem and foreign.without_name(file, check.problem)
            n_ignored = len(entry.bad) - len(bad)
            status = max(
                status, _report(answer, file, problem, bad, entry.n_tensors, n_ignored=n_ignored)
            )
    return status


def _verify_file(path: Path, ignore: Sequence[str], answer: Answer) -> int:
    try:
        found = inspect(path)
    except (CheckpointError, OSError) as error:
        return _report(answer, path, foreign.problem_of(path, error), (), 0)
    problem = f"{', '.join(found.damaged)} changed after it was written" if found.damaged else None
    bad = not_ignored(found.bad, ignore)
    meant = [(culprit, what) for culprit, what in found.meant if not_ignored([culprit], ignore)]
    unread = found.contents.unread
    status = _report(
        answer,
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
        answer.note(f"{what}: {describe_culprits(culprits)}", INDENT)
    if nan := not_ignored(nan_numbers(found.contents.tree), ignore):
        more = f" and {len(nan) - SHOWN} more" if len(nan) > SHOWN else ""
        names = ", ".join(name for name, *_ in nan[:SHOWN])
        answer.note(f"values other than tensors that are NaN: {names}{more}", INDENT)
    for name, what in unread[:SHOWN]:
        answer.note(f"{name} was not read: {what}", INDENT)
    if refused := refused_names(found.contents.names):
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        answer.note(
            f"torch.load(weights_only=True) refuses it: {', '.join(refused[:SHOWN])}"
            f"{more}; load it without weights_only only if you trust its author",
            INDENT,
        )
    return status


def _verify_index(path: Path, ignore: Sequence[str], answer: Answer, *, with_files: bool) -> int:
    """Verifies an index and, with `with_files`, the files that it names."""
    try:
        found = check_index(path)
    except (CheckpointError, OSError) as error:
        return _report(answer, path, foreign.problem_of(path, error), (), 0)
    for problem in found.problems:
        answer.say(f"BAD  {path}: {problem}", path=str(path), verdict="bad", problem=problem)
    if not found.problems:
        answer.say(
            f"ok   {path}: {found.n_tensors} tensors, each present in the file named by the index",
            path=str(path),
            verdict="ok",
            tensors=found.n_tensors,
        )
    status = FOUND_BAD if found.problems else FINE
    return max(
        [status, *(_verify_file(file, ignore, answer) for file in found.files if with_files)]
    )


def _report(
    answer: Answer,
    path: Path,
    problem: str | None,
    bad: Sequence[Culprit],
    n_tensors: int,
    *,
    n_meant: int = 0,
    n_ignored: int = 0,
    n_unread: int = 0,
) -> int:
    """Reports the result for one file; returns the exit status.

    Args:
        answer: Receives the report.
        path: The file.
        problem: Why it is not a complete checkpoint, or None.
        bad: The tensors that are unexpectedly non-finite.
        n_tensors: Number of tensors read.
        n_meant: Number of tensors that are infinite by design.
        n_ignored: Number of non-finite tensors excluded by `--ignore`.
        n_unread: Number of tensors not read.
    """
    facts = {
        "path": str(path),
        "verdict": "bad" if bad or problem is not None else "ok",
        "problem": problem,
        "tensors": n_tensors,
        "bad": list(bad),
        "by_design": n_meant,
        "ignored": n_ignored,
        "unread": n_unread,
    }
    if problem is not None:
        answer.say(f"BAD  {path}: {problem}", **facts)
        facts = {}
    if bad:
        are = "is" if len(bad) == 1 else "are"
        answer.say(f"BAD  {path}: {len(bad)} of {n_tensors} tensors {are} not finite", **facts)
    for culprit in bad:
        answer.say(f"       {describe_culprits([culprit])}")
    if bad:
        answer.say(
            "       (use --ignore PATTERN for tensors that are non-finite by design, such as "
            '"*.attn_mask")'
        )
    if bad or problem is not None:
        return FOUND_BAD
    text = foreign.NO_TENSORS
    if n_tensors:
        tensors = "1 tensor" if n_tensors == 1 else f"{n_tensors} tensors"
        excepted = [f"{n_meant} by design"] * bool(n_meant) + [f"{n_ignored} ignored"] * bool(
            n_ignored
        )
        text = f"{tensors}, {'finite' if excepted or n_unread else 'all finite'}"
        text += f" except {' and '.join(excepted)}" if excepted else ""
    text += f"; {n_unread} more not read" if n_unread else ""
    answer.say(f"ok   {path}: {text}", **facts)
    return FINE
