"""Where records go: JSON lines, TensorBoard, other loggers, any callable: `opt.add_sink(sink)`.

A sink takes one `StepRecord`; it is called once a step, in order, when the record has reached the
host. A sink never ends a run: what it cannot write is counted, and said once, also if it raises.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import printable, shown
from fastguard.records.line_writer import LineWriter
from fastguard.records.rotated_files import open_run
from fastguard.records.step_record import FIELDS, StepRecord
from fastguard.records.strict_json import encode

log = logging.getLogger("fastguard")

LONGEST_LINE = 1 << 24
"""Bytes from which on a line is damage, not a record."""

_COUNTS = (
    "step",
    "nan",
    "posinf",
    "neginf",
    "n_culprits",
    "consecutive_skips",
    "culprit_ranks",
)
_FLOATS = ("total_norm", "clip_coef", "lr")


class JsonLinesSink:
    """Appends one JSON object a line; NaN and Inf become `"NaN"`, `"Infinity"`, `"-Infinity"`.

    A line is handed to the system in one write, so a killed process leaves at most the last line
    cut short, which readers skip; the next run starts on a new line. Full files are renamed to
    `records.1.jsonl`, `records.2.jsonl`, ... and the oldest beyond `keep` are deleted.

    One process writes to a file. Its threads may share a sink, and several sinks a path. A copy in
    another process, forked or pickled, writes when no other process does; until then its records
    are lost, and counted.

    Args:
        path: The file; its folder is created.
        max_bytes: Size at which a file is full.
        keep: How many full files are kept beside the current one; None: all.

    Attributes:
        lost: How many records could not be written.

    Raises:
        ValueError: `max_bytes` or `keep` is out of range.
        BlockingIOError: Another process writes to the file; it names which, where that is known.
        OSError: The file cannot be opened for writing, or is a pipe or a device.

    Example:
        >>> import tempfile, fastguard
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> with JsonLinesSink(path) as sink:
        ...     sink(fastguard.StepRecord(1, float("inf"), 1.0, "applied"))
        >>> [record.total_norm for record in read_records(path)]
        [inf]
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int = 1 << 30, keep: int | None = None
    ) -> None:
        count_of("max_bytes", max_bytes, 1024)
        if keep is not None:
            count_of("keep", keep, 0, optional=True)
        self._set_up(check_file(path), max_bytes, keep)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._writer.open()
        except BaseException:
            self._writer.leave()
            raise

    def _set_up(self, path: Path, max_bytes: int, keep: int | None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.keep = keep
        self.lost = 0
        self._closed = False
        self._writer = LineWriter.of(path)

    def __getstate__(self) -> tuple[Path, int, int | None]:
        # A descriptor is a number that means another file elsewhere: a copy opens its own, when it
        # has something to write.
        return self._writer.path, self.max_bytes, self.keep

    def __setstate__(self, state: tuple[Path, int, int | None]) -> None:
        self._set_up(*state)

    def __call__(self, record: StepRecord) -> None:
        with self._writer.lock:
            try:
                if self._closed:
                    raise OSError("the sink is closed")
                line = encode(record.as_dict()) + "\n"
                self._writer.append(line.encode(), self.max_bytes, self.keep)
            except Exception as error:  # disks and records have ways of their own to fail
                self.lost += 1
                if self.lost == 1:
                    log.warning("records are being lost: cannot write %s: %s", self.path, error)

    def close(self) -> None:
        """Flushes to the disk and closes; further records are lost."""
        with self._writer.lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._writer.flush()
            except OSError as error:
                log.warning("the last records may be lost: cannot flush %s: %s", self.path, error)
            finally:
                self._writer.leave()

    def __enter__(self) -> JsonLinesSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_sink(sink: object) -> None:
    """Raises a TypeError for what cannot be called with a record."""
    if isinstance(sink, type):
        raise TypeError(
            f"sink is the class {sink.__name__}; make one: add_sink({sink.__name__}(...))"
        )
    if not callable(sink):
        raise TypeError(f"sink={shown(sink, form=repr)} must be callable with a StepRecord")


def check_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file of records, which need not exist yet.

    Raises:
        TypeError: It is no path.
        IsADirectoryError: It is a folder, or written like one.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{path!r} is no path for records; name a file, such as 'run/records.jsonl'"
        )
    if os.fspath(path).endswith("/") or Path(path).is_dir():
        raise _is_a_folder(path)
    return Path(path)


def _is_a_folder(path: str | os.PathLike[str]) -> IsADirectoryError:
    return IsADirectoryError(
        f"{os.fspath(path)!r} is a folder; name a file in it, such as "
        f"{str(Path(path) / 'records.jsonl')!r}"
    )


def read_records(path: str | os.PathLike[str], *, strict: bool = False) -> Iterator[StepRecord]:
    """The records of a `JsonLinesSink`, oldest first, rotated files included.

    A run may go on meanwhile: what is read are its records up to about the beginning of the call.

    Args:
        path: The current file.
        strict: Raise at the first line that is no record, instead of skipping and counting it.

    Raises:
        FileNotFoundError: There is no such file, nor a full one beside it.
        IsADirectoryError: It is a folder.
        OSError: It cannot be read, or is a pipe or a device.
        ValueError: With `strict`, naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise _is_a_folder(path)
    skipped = 0
    for name, file in open_run(path):
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                yield parse_record(line)
            except ValueError as error:
                if strict:
                    raise ValueError(
                        f"{printable(str(name))}:{number} is no record ({shown(error)}); delete "
                        "the line, or read with strict=False"
                    ) from None
                skipped += 1
    if skipped:
        log.warning("%s: %d damaged lines were skipped", path, skipped)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The numbered lines; one that is too long to be a record is `b"..."`, whatever its size."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                pass
            line = b"..."
        yield number, line


def parse_record(line: bytes) -> StepRecord:
    """The record in one line of a `JsonLinesSink`; fields that are unknown here are ignored.

    Raises:
        ValueError: The line is no record, or one that was cut short.

    Example:
        >>> parse_record(b'{"step": 3, "total_norm": "NaN", "clip_coef": 1, "action": "skipped"}')
        StepRecord(step=3, total_norm=nan, clip_coef=1.0, action='skipped', ...)
    """
    try:
        return _record(json.loads(line))
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _record(fields: Any) -> StepRecord:
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    fields = {name: value for name, value in fields.items() if name in FIELDS}
    for name in _FLOATS:
        if name in fields:
            fields[name] = float(fields[name])  # "NaN" and "Infinity" too
    for name in ("losses", "thresholds"):
        fields[name] = {k: float(v) for k, v in fields.get(name, {}).items()}
    fields["culprits"] = tuple(
        (str(name), _count("nan", nan), _count("posinf", posinf), _count("neginf", neginf))
        for name, nan, posinf, neginf in fields.get("culprits", ())
    )
    fields["spikes"] = tuple(map(str, fields.get("spikes", ())))
    record = StepRecord(**fields)
    for name in _COUNTS:
        _count(name, getattr(record, name))
    if record.culprit_rank is not None:
        _count("culprit_rank", record.culprit_rank)
    if not isinstance(record.action, str) or not isinstance(record.reason, str | None):
        what = f"action {shown(record.action)} or reason {shown(record.reason)}"
        raise ValueError(f"{what} is not a name")
    return record


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:  # a float64, and so JSON, has those
        raise ValueError(f"{name} is {shown(value)}, not a count")
    return value


class TensorBoardSink:
    """Writes `train/grad_norm`, `train/clip_coef`, `train/skipped`, `train/lr` and the losses.

    Args:
        writer: A `SummaryWriter`, or a folder to make one for.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed; run: pip install 'torch-fastguard[tensorboard]'"
                ) from error
            writer = SummaryWriter(os.fspath(writer))
        self.writer = writer

    def __call__(self, record: StepRecord) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flushes and closes the writer."""
        self.writer.close()


class LogSink:
    """Hands the scalars of every record to a logger that takes a dict and a step.

    That is `log` of a Weights & Biases run, `mlflow.log_metrics`, and most others. What the logger
    raises is counted in `lost`, and said once.

    Args:
        log: Called as `log(scalars, step=step)`, with the names of `scalars`.
        prefix: What goes before the slash.
        step_name: Pass the step as a scalar of this name instead of `step=`: for a W&B run that
            counts its own steps, which it only lets grow.

    Raises:
        TypeError: `log` cannot be called.

    Example:
        >>> from fastguard import LogSink, StepRecord
        >>> sink = LogSink(lambda scalars, step: print(step, scalars["train/grad_norm"]))
        >>> sink(StepRecord(7, 2.0, 0.5, "clipped"))
        7 2.0
    """

    def __init__(
        self, log: Callable[..., object], *, prefix: str = "train", step_name: str | None = None
    ) -> None:
        if not callable(log):
            raise TypeError(
                f"log={shown(log, form=repr)} must be callable with a dict, such as "
                "wandb.init().log"
            )
        self.log = log
        self.prefix = prefix
        self.step_name = step_name
        self.lost = 0

    def __call__(self, record: StepRecord) -> None:
        values = scalars(record, self.prefix)
        try:
            if self.step_name is None:
                self.log(values, step=record.step)
            else:
                self.log({**values, self.step_name: record.step})
        except Exception as error:  # a logger has ways of its own to fail; the run goes on
            self.lost += 1
            if self.lost == 1:
                log.warning(
                    "records are being lost: %s cannot log: %s",
                    shown(self.log, form=repr),
                    shown(error, form=repr),
                )


def scalars(record: StepRecord, prefix: str = "train") -> dict[str, float]:
    """What loggers plot of a record, under the names that they are used to.

    Args:
        record: One step.
        prefix: What goes before the slash.

    Returns:
        Finite numbers only: a plot of NaN is an empty plot, and the incident is in `skipped`. A
        loss called `seg` is `train/seg_loss`.

    Example:
        >>> from fastguard import StepRecord
        >>> scalars(StepRecord(1, 2.0, 0.5, "clipped", lr=0.1))
        {'train/grad_norm': 2.0, 'train/clip_coef': 0.5, 'train/lr': 0.1, 'train/skipped': 0.0}
    """
    values = {"grad_norm": record.total_norm, "clip_coef": record.clip_coef, "lr": record.lr}
    values |= {"skipped": float(record.action == "skipped")}
    # "seg_loss" and not "loss/seg": to MLflow's file store loss cannot be a metric and a folder.
    values |= {name if "loss" in name else f"{name}_loss": v for name, v in record.losses.items()}
    return {f"{prefix}/{name}": v for name, v in values.items() if math.isfinite(v)}
