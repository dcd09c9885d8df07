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
from glob import escape
from pathlib import Path
from typing import Any

from fastguard.checked_numbers import count_of
from fastguard.step_record import FIELDS, StepRecord
from fastguard.strict_json import encode

log = logging.getLogger("fastguard")

_FLOATS = ("total_norm", "clip_coef", "lr")


class JsonLinesSink:
    """Appends one JSON object a line; NaN and Inf become `"NaN"`, `"Infinity"`, `"-Infinity"`.

    A line is handed to the system in one write, so a killed process leaves at most the last line
    cut short, which readers skip; the next run starts on a new line. Full files are renamed to
    `records.1.jsonl`, `records.2.jsonl`, ... and the oldest beyond `keep` are deleted.

    Args:
        path: The file; its folder is created.
        max_bytes: Size at which a file is full.
        keep: How many full files are kept beside the current one; None: all.

    Raises:
        ValueError: `max_bytes` or `keep` is out of range.
        OSError: The file cannot be opened for writing.

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
        self.path = check_file(path)
        self.max_bytes = max_bytes
        self.keep = keep
        self.lost = 0
        self._file, self._size, self._closed = -1, 0, False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def __call__(self, record: StepRecord) -> None:
        # A file name that is no UTF-8 is a string with lone surrogates, which JSON can escape.
        line = (encode(record.as_dict()) + "\n").encode(errors="backslashreplace")
        try:
            if self._closed:
                raise OSError("the sink is closed")
            if self._file < 0:  # the last record could not be written
                self._open()
            if self._size and self._size + len(line) > self.max_bytes:
                self._rotate()
            written = os.write(self._file, line)
            self._size += written
            if written < len(line):
                self._release()  # opening it again ends the line
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.warning("records are being lost: cannot write %s: %s", self.path, error)

    def close(self) -> None:
        """Flushes to the disk and closes; further records are lost."""
        self._closed = True
        if self._file < 0:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            log.warning("the last records may be lost: cannot flush %s: %s", self.path, error)
        finally:
            self._release()

    def __enter__(self) -> JsonLinesSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                size += os.write(file, b"\n")  # after a line that was cut short
        except BaseException:
            os.close(file)
            raise
        self._file, self._size = file, size

    def _release(self) -> None:
        """Closes the file. Forgets its number first: it may soon be that of a checkpoint."""
        file, self._file = self._file, -1
        os.close(file)

    def _rotate(self) -> None:
        full = rotated_files(self.path)
        number = 1 + max((_number(p) for p in full), default=0)
        self._release()
        self.path.rename(self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}"))
        self._open()
        if self.keep is not None:
            for old in rotated_files(self.path)[: -self.keep or None]:
                old.unlink()


def check_sink(sink: object) -> None:
    """Raises a TypeError for what cannot be called with a record."""
    if isinstance(sink, type):
        raise TypeError(
            f"sink is the class {sink.__name__}; make one: add_sink({sink.__name__}(...))"
        )
    if not callable(sink):
        raise TypeError(f"sink={sink!r} must be callable with a StepRecord")


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


def rotated_files(path: str | os.PathLike[str]) -> list[Path]:
    """The full files of a `JsonLinesSink`, oldest first, without the current one."""
    path = Path(path)
    found = [
        p
        for p in path.parent.glob(f"{escape(path.stem)}.*{escape(path.suffix)}")
        if p.name[len(path.stem) + 1 : len(p.name) - len(path.suffix)].isdigit()
    ]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.suffixes[-2][1:] if path.suffix and len(path.suffixes) > 1 else path.suffix[1:])


def read_records(path: str | os.PathLike[str], *, strict: bool = False) -> Iterator[StepRecord]:
    """The records of a `JsonLinesSink`, oldest first, rotated files included.

    Args:
        path: The current file.
        strict: Raise at the first line that is no record, instead of skipping and counting it.

    Raises:
        FileNotFoundError: There is no such file, nor a full one beside it.
        IsADirectoryError: It is a folder.
        ValueError: With `strict`, naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        raise _is_a_folder(path)
    full = rotated_files(path)
    skipped = 0
    for file in (*full, path):
        try:
            lines = file.open("rb")
        except FileNotFoundError:  # a full one was deleted, or the next one is about to be opened
            if not full:
                raise
            continue
        with lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield parse_record(line)
                except ValueError as error:
                    if strict:
                        raise ValueError(
                            f"{file}:{number} is no record ({error}); delete the line, or read "
                            "with strict=False"
                        ) from None
                    skipped += 1
    if skipped:
        log.warning("%s: %d damaged lines were skipped", path, skipped)


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
        (str(name), int(nan), int(posinf), int(neginf))
        for name, nan, posinf, neginf in fields.get("culprits", ())
    )
    fields["spikes"] = tuple(map(str, fields.get("spikes", ())))
    record = StepRecord(**fields)
    for name in ("step", "nan", "posinf", "neginf", "n_culprits", "consecutive_skips"):
        if type(getattr(record, name)) is not int:
            raise ValueError(f"{name} is {getattr(record, name)!r}, not an integer")
    if not isinstance(record.action, str) or not isinstance(record.reason, str | None):
        raise ValueError(f"action {record.action!r} or reason {record.reason!r} is not a name")
    return record


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
            raise TypeError(f"log={log!r} must be callable with a dict, such as wandb.init().log")
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
                log.warning("records are being lost: %r cannot log: %r", self.log, error)


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
