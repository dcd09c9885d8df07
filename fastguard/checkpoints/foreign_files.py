"""Describes checkpoint files written by other programs, and rolls them back.

A rollback copies a good file over the target, byte for byte. Nothing is unpickled or rewritten, so
the framework reads exactly what it wrote and resumes from the epoch recorded in the good file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard.checkpoints import durable_files as files
from fastguard.checkpoints.errors import CheckpointError, DamagedFile
from fastguard.checkpoints.find_files import checkpoint_files
from fastguard.checkpoints.reading.contents import read_contents
from fastguard.checkpoints.reading.file_report import HEADER, not_ignored
from fastguard.checkpoints.reading.inspect_file import Inspection, inspect, sha256_of
from fastguard.checkpoints.weights import holds_weights, name_rules_out_weights
from fastguard.records.regular_files import check_regular

_EPOCH = ("epoch",)
_STEP = ("step", "global_step", "iteration", "iter_num")
_METRIC = ("best_fitness", "metric", "best_val_loss", "fitness")
UNREADABLE = "unreadable"
NO_TENSORS = "holds no tensors"
NO_WEIGHTS = "holds no weights"
NOT_FINITE = "not finite, first"
_OPTIMIZER = ("optimizer", "optimizer_states", "optimizer_state_dict", "optim")


@dataclass(frozen=True, slots=True)
class Description:
    """Metadata of a checkpoint file, obtained without reading its tensors.

    Attributes:
        path: The file.
        size: File size in bytes.
        modified: Modification time in seconds since 1970.
        format: `"torch"`, `"torch (legacy)"`, `"safetensors"`, or `"unreadable"` with a `problem`.
        n_tensors: Number of distinct tensors.
        epoch, step, metric: Values found under the usual names at the top level; else None.
        resumable: Whether the file contains optimizer state.
        has_weights: Whether the file can hold a model, and not just an optimizer or random states.
        problem: Why the file cannot be read; None if it can.
        tensors: Name and shape of each tensor.
    """

    path: Path
    size: int
    modified: float
    format: str
    n_tensors: int = 0
    epoch: int | None = None
    step: int | None = None
    metric: float | None = None
    resumable: bool = False
    has_weights: bool = False
    problem: str | None = None
    tensors: frozenset[tuple[str, tuple[int, ...]]] = frozenset()


def describe(path: Path) -> Description:
    """Describes a checkpoint file, or reports why it cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        return Description(path, 0, 0.0, UNREADABLE, problem=problem_of(path, error))
    try:
        contents = read_contents(path)
    except (CheckpointError, OSError) as error:
        problem = problem_of(path, error)
        return Description(path, stat.st_size, stat.st_mtime, UNREADABLE, problem=problem)
    top: dict[Any, Any] = contents.tree if isinstance(contents.tree, dict) else {}
    # Only with "objects", since the state of a guarded optimizer has a key HEADER too.
    header = top.get(HEADER) if "objects" in top else None
    header = header if isinstance(header, dict) else None
    states = top if header is None else top["objects"]
    top = {**contents.metadata, **top, **(header or {})}
    has_optimizer = isinstance(states, dict) and any(states.get(k) is not None for k in _OPTIMIZER)
    return Description(
        path,
        stat.st_size,
        stat.st_mtime,
        contents.format,
        contents.n_tensors,
        _first_known(top, _EPOCH, _whole),
        _first_known(top, _STEP, _whole),
        _first_known(top, _METRIC, float),
        has_optimizer,
        has_weights=holds_weights(contents),
        tensors=frozenset(
            [(span.name, tuple(span.size)) for span in contents.spans]
            + [(name, array.shape) for name, array in contents.arrays]
        ),
    )


def problem_of(path: Path, error: CheckpointError | OSError) -> str:
    """Returns the description of an error, phrased to follow the name of the file."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return without_name(path, str(error))


def without_name(path: Path, problem: str) -> str:
    """Removes the file name from the start of a problem."""
    return problem.removeprefix(str(path)).removeprefix(":").lstrip()


def _first_known(top: dict[Any, Any], names: Iterable[str], kind: Callable[[Any], Any]) -> Any:
    """Returns the first number found under the given names; other values are ignored."""
    for name in names:
        value = top.get(name)
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                return kind(value)
    return None


def _whole(value: int | float | str) -> int:
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise OverflowError
    return number


def good_source(target: Path, ignore: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint beside `target` to roll back to.

    The result is the complete and finite file with the latest epoch that is not later than the
    epoch of the target. If no epoch is known, the step decides; if no step is known, the
    modification time.

    Files without tensors (settings, a schedule) are never chosen. Since a folder may contain
    several models, a candidate must share tensors with the target, by name and shape: at least half
    of the tensors of the smaller file. The share is one half because data positions and histories
    change their shapes. It refers to the smaller file because an optimizer has no state before its
    first step.

    Args:
        target: The file to be replaced; it may be damaged or missing.
        ignore: Patterns of tensors whose NaN and Inf do not count.

    Returns:
        The file, or None, and the reason each earlier candidate was rejected.
    """
    now = describe(target) if target.exists() else None
    candidates = [describe(p) for p in checkpoint_files(target.parent) if p != target]
    candidates.sort(key=_age, reverse=True)
    passed_over = []
    for candidate in candidates:
        reason = (
            candidate.problem or _mismatch(candidate, now) or _flaw_on_disk(candidate.path, ignore)
        )
        if reason is None:
            return candidate.path, passed_over
        passed_over.append(f"{candidate.path.name}: {reason}")
    return None, passed_over


def _age(found: Description) -> tuple[int, int, float]:
    epoch, step = (-1 if n is None else n for n in (found.epoch, found.step))
    return epoch, step, found.modified


def _mismatch(candidate: Description, now: Description | None) -> str | None:
    if not candidate.n_tensors:
        return NO_TENSORS
    if now is None or now.problem:  # an unreadable target is most likely a model
        return None if candidate.has_weights else NO_WEIGHTS
    if now.has_weights and not candidate.has_weights:
        return NO_WEIGHTS
    if now.resumable and not candidate.resumable:
        return "holds no optimizer state to resume with"
    if candidate.epoch is not None and now.epoch is not None and candidate.epoch > now.epoch:
        return f"is from epoch {candidate.epoch}, later than epoch {now.epoch}"
    has_epoch = candidate.epoch is not None or now.epoch is not None
    if not has_epoch and candidate.step is not None and now.step is not None:
        if candidate.step > now.step:
            return f"is from step {candidate.step}, later than step {now.step}"
    n_shared = len(candidate.tensors & now.tensors)
    n_compared = min(len(candidate.tensors), len(now.tensors))
    if 2 * n_shared < n_compared:
        return f"belongs to another model: it shares {n_shared} of {n_compared} tensors"
    return None


def is_sound(path: Path, ignore: Sequence[str] = ()) -> bool:
    """Whether the file exists and is complete and finite; reads all of it."""
    return path.exists() and _flaw_on_disk(path, ignore) is None


def _flaw_on_disk(path: Path, ignore: Sequence[str]) -> str | None:
    try:
        found = inspect(path)
    except (CheckpointError, OSError) as error:
        return problem_of(path, error)
    return _flaw(found, ignore)


def _flaw(found: Inspection, ignore: Sequence[str]) -> str | None:
    """Returns the problem with a file that was read, or None."""
    if found.damaged:
        return f"{', '.join(found.damaged)} changed after the file was written"
    if not found.contents.n_tensors:
        return NO_TENSORS
    bad = not_ignored(found.bad, ignore)
    are = "tensor is" if len(bad) == 1 else "tensors are"
    return f"{len(bad)} {are} {NOT_FINITE} {bad[0][0]}" if bad else None


def roll_back_file(
    target: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    ignore: Sequence[str] = (),
) -> Path | None:
    """Atomically replaces a checkpoint file with a copy of a good one; the old file is kept.

    Args:
        target: The file that the training program will resume from.
        source: A complete and finite checkpoint.
        ignore: Patterns of tensors whose NaN and Inf do not count.

    Returns:
        The new path of the old target: its name with `.replaced-1` (or 2, ...) appended. None if
        there was no target.

    Raises:
        CheckpointError: The source is the target, is damaged or not finite, holds no tensors, or
            holds no weights although the target does. Nothing was changed.
        OSError: The disk is full or read-only, or the target is not a regular file. Nothing was
            changed.
    """
    target, source = Path(target), Path(source)
    with contextlib.suppress(FileNotFoundError):
        check_regular(target.stat(), target)
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{source} is the file to be replaced; choose another source")
    refused = f"{source} cannot be used for a rollback: "
    try:
        found = inspect(source, sha256=True)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(refused + problem_of(source, error)) from error
    if flaw := _flaw(found, ignore):
        raise CheckpointError(refused + flaw)
    if not holds_weights(found.contents) and _had_weights(target):
        raise CheckpointError(
            f"{refused}{NO_WEIGHTS}, but {target} holds weights, or held them before it was damaged"
        )
    temporary = files.copy_temporary(source, target)
    try:
        if sha256_of(temporary) != found.sha256:
            raise DamagedFile(
                f"the copy of {source} differs from the verified file, because another process "
                "writes to that file or the disk is failing; nothing was changed. Stop the other "
                "process, or check the disk"
            )
        backup = _keep(target) if target.exists() else None
        files.commit(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return backup


def _had_weights(target: Path) -> bool:
    """Whether a file to be replaced holds weights, or may have held them before it was damaged."""
    if not target.exists():
        return False
    now = describe(target)
    return now.has_weights if now.problem is None else not name_rules_out_weights(target)


def _keep(path: Path) -> Path:
    """Gives the file a second name, which remains when the file of the first name is replaced."""
    n = 1
    while (backup := path.with_name(f"{path.name}.replaced-{n}")).exists():
        n += 1
    try:
        os.link(path, backup)
    except OSError:  # the file system has no hard links
        files.commit(files.copy_temporary(path, backup), backup)
    files.sync_folder(path.parent)
    return backup
