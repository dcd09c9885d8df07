"""`fastguard ckpt verify`: reads whole checkpoints and reports what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastguard.checkpoints import find_files as finding
from fastguard.checkpoints import foreign_files as foreign
from fastguard.checkpoints.errors import CheckpointError
from fastguard.checkpoints.folder import is_store
from fastguard.checkpoints.index_files import check_index, is_index
from fastguard.checkpoints.missing_files import missing_parts, missing_shards
from fastguard.checkpoints.reading.file_report import not_ignored
from fastguard.checkpoints.reading.inspect_file import inspect
from fastguard.checkpoints.reading.weights_only import refused_names
from fastguard.checkpoints.store import CheckpointStore
from fastguard.commands.ckpt.answer import Answer
from fastguard.commands.usage import FINE, FOUND_BAD, UsageError
from fastguard.errors import Culprit, describe_culprits, several

SHOWN = 3
INDENT = " " * 7  # aligns with the path in verify's lines


def verify(path: Path, ignore: Sequence[str], answer: Answer) -> int:
    """Verifies a file, an index, a store, or everything below a folder; returns the exit status."""
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
    if path.suffix == ".distcp":
        return _verify_found(finding.Found(path.parent, "shards"), ignore, answer)
    return _verify_file(path, ignore, answer)


def _verify_folder(folder: Path, ignore: Sequence[str], answer: Answer) -> int:
    """Verifies everything below the folder; an unreadable file gets its own row."""
    status = None
    for found in finding.walk(folder):
        if found.kind == "other":
            _skip(answer, found.path, found.why)
            continue
        status = max(status or FINE, _verify_found(found, ignore, answer))
    if status is None:
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    return status


def _skip(answer: Answer, path: Path, why: str) -> None:
    answer.say(f"skip {path}: {why}", path=str(path), verdict="skipped", problem=why)


def _verify_found(found: finding.Found, ignore: Sequence[str], answer: Answer) -> int:
    if found.kind == "file":
        return _verify_file(found.path, ignore, answer)
    if found.kind == "index":
        return _verify_index(found.path, ignore, answer, with_files=False)
    if found.kind == "incomplete":
        return _report(answer, found.path, found.why)
    if found.kind == "shards":  # shards are not verified, so the exit status is not 0
        if not finding.is_of_a_store(found.path) and (lacking := missing_shards(found.path)):
            return _report(answer, found.path, lacking)
        _skip(answer, found.path, finding.how_to_read_shards(found.path))
        return FOUND_BAD
    if found.kind == "unreadable":
        return _report(answer, found.path, f"cannot be read: {found.why}")
    try:
        return _verify_store(found.path, ignore, answer)
    except (CheckpointError, OSError) as error:
        return _report(answer, found.path, foreign.problem_of(found.path, error))


def _verify_store(path: Path, ignore: Sequence[str], answer: Answer) -> int:
    status = FINE
    with CheckpointStore(path, read_only=True) as store:
        for name, why in store.unreadable().items():
            problem = foreign.without_name(path / name, why)
            status = _report(answer, path / name, problem)
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
        return _report(answer, path, foreign.problem_of(path, error))
    problem = (
        f"{', '.join(found.damaged)} changed after the file was written" if found.damaged else None
    )
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
    if nan := not_ignored([(name, 1, 0, 0) for name in found.contents.nan], ignore):
        names = several([name for name, *_ in nan])
        answer.note(f"values other than tensors that are NaN: {names}", INDENT)
    for name, what in unread[:SHOWN]:
        answer.note(f"{name} was not read: {what}", INDENT)
    if refused := [*refused_names(found.contents.names), *found.contents.refused]:
        answer.note(
            f"torch.load(weights_only=True) refuses this file: {several(refused)}. Load it with "
            "weights_only=False only if you trust its author",
            INDENT,
        )
    return status


def _verify_index(path: Path, ignore: Sequence[str], answer: Answer, *, with_files: bool) -> int:
    """Verifies an index and, with `with_files`, the files that it names."""
    try:
        found = check_index(path)
    except (CheckpointError, OSError) as error:
        return _report(answer, path, foreign.problem_of(path, error))
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
    bad: Sequence[Culprit] = (),
    n_tensors: int = 0,
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
