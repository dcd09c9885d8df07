"""`fastguard ckpt rollback`: chooses the checkpoint to go back to and reports the result."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastguard.checkpoints import find_files as finding
from fastguard.checkpoints import foreign_files as foreign
from fastguard.checkpoints.folder import is_checkpoint, is_store
from fastguard.checkpoints.index_files import is_index
from fastguard.checkpoints.reader import Which
from fastguard.checkpoints.store import CheckpointStore
from fastguard.commands.ckpt.answer import Answer
from fastguard.commands.terminal import say, text_of
from fastguard.commands.usage import FINE, FOUND_BAD, UsageError
from fastguard.errors.logger import PREFIX, log
from fastguard.errors.plain_text import shown


def run(path: Path, to: str | None, ignore: Sequence[str], answer: Answer) -> int:
    """Makes an earlier checkpoint the one that training resumes from; returns the exit status."""
    if path.is_dir() and is_store(path):
        return _rollback_store(path, to, answer)
    if path.is_file() and is_store(path.parent) and is_checkpoint(path):
        raise UsageError(
            f"{path} is a checkpoint of a store; use: fastguard ckpt rollback {path.parent} "
            "--to STEP"
        )
    _refuse_index(path)
    target = _file_to_resume_from(path) if path.is_dir() else path
    passed_over: Sequence[str] = ()
    if to is None:
        source, passed_over = foreign.good_source(target, ignore)
        for line in passed_over:
            answer.say(f"passed over {line}")
        if source is None:
            hint = (
                "; use --ignore PATTERN for tensors that are non-finite by design"
                if any(foreign.NOT_FINITE in line for line in passed_over)
                else ""
            )
            say(f"fastguard ckpt: no good checkpoint next to {target}{hint}", file=sys.stderr)
            return FOUND_BAD
    else:
        source = _source_file(Path(to), target)
    before, after = foreign.describe(target), foreign.describe(source)
    was_good = foreign.is_sound(target, ignore)
    backup = foreign.roll_back_file(target, source, ignore=ignore)
    answer.say(
        f"{target}{_position(before)} is now a copy of {source}{_position(after)}",
        path=str(target),
        copy_of=str(source),
        kept_in=str(backup),
        epoch=after.epoch,
        step=after.step,
        passed_over=passed_over,
    )
    answer.say(f"the replaced file is kept in {backup}")
    if to is None and after.epoch is None and after.step is None:
        answer.note("the source contains no epoch or step; it was chosen by its modification time")
    if was_good:
        answer.note(
            "the replaced file was complete and finite too; to undo the rollback, use --to "
            f"{backup}"
        )
    if not after.resumable:
        answer.note("the source contains no optimizer state, so the optimizer starts from scratch")
    return FINE


def _rollback_store(path: Path, to: str | None, answer: Answer) -> int:
    which: Which = "last-clean"
    if to is not None:
        is_step = to.isdecimal() and len(to) <= 18
        if not is_step and to not in ("last", "last-clean", "best"):
            raise UsageError(
                f"--to {shown(to)} is not a checkpoint of a store; use a step, best or last-clean"
            )
        which = int(to) if is_step else to  # type: ignore[assignment]
    with CheckpointStore(path) as store:
        before = store.list()
        with _rollback_unlogged():
            target = store.rollback(which)
        # replaced checkpoints have verdicts
        aside = {entry.serial: entry for entry in store.replaced()}
        for entry in before:
            if entry.serial in aside:
                answer.say(f"set aside {aside[entry.serial]}")
        set_aside = [str(aside[e.serial]) for e in before if e.serial in aside]
        answer.say(
            f"training resumes after {target}",
            path=str(path / target.file),
            step=target.step,
            epoch=target.epoch,
            set_aside=set_aside,
        )
    return FINE


@contextlib.contextmanager
def _rollback_unlogged() -> Iterator[None]:
    """Hides the log line about the rollback, because the command prints the result itself."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.msg.startswith(f"{PREFIX}rolled back to")

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _refuse_index(path: Path) -> None:
    if is_index(path):
        raise UsageError(f"{path} is an index without tensors; pass one of the files that it lists")


def _source_file(source: Path, target: Path) -> Path:
    _refuse_index(source)
    if source.is_dir():
        raise UsageError(f"--to {source} is a folder; pass a file in it")
    beside = target.parent / source
    if not source.exists() and beside.is_file():
        raise UsageError(
            f"{source} does not exist in the current folder; did you mean --to {beside}?"
        )
    if not source.exists():
        raise UsageError(f"{source} does not exist")
    return source


def _file_to_resume_from(folder: Path) -> Path:
    for path in (folder / "last.pt", folder / "weights" / "last.pt", folder / "last.ckpt"):
        if path.is_file():
            return path
    if finding.is_shards(folder):
        raise UsageError(f"{folder} {finding.how_to_read_shards(folder)}")
    found = finding.checkpoint_files(folder)
    if not found:
        raise UsageError(f"{folder} {finding.where_else(folder)}")
    newest = max(found, key=lambda path: foreign.describe(path).modified)
    raise UsageError(
        f"{folder} is not a store and has no last.pt or last.ckpt; pass the file that training "
        f"resumes from, for instance: fastguard ckpt rollback {newest} (use --to FILE to choose "
        "the file to copy)"
    )


def _position(found: foreign.Description) -> str:
    known = {"epoch": found.epoch, "step": found.step, "metric": found.metric}
    text = ", ".join(
        f"{name} {text_of(value)}" for name, value in known.items() if value is not None
    )
    return f" ({text})" if text else ""
