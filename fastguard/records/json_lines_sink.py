"""`JsonLinesSink`, and the checks of the argument of `opt.add_sink(sink)`.

A sink is a callable that takes one `StepRecord`. It is called once per step, in order, when the
record has reached the host. A sink that raises does not end the run: the lost records are counted,
and one warning is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from fastguard.errors.checked_numbers import count_of
from fastguard.errors.plain_text import shown
from fastguard.records.line_writer import LineWriter
from fastguard.records.regular_files import folder_error
from fastguard.records.step_record import StepRecord
from fastguard.records.strict_json import encode

log: logging.Logger = logging.getLogger("fastguard")


class JsonLinesSink:
    """Appends one JSON object per line; NaN and Inf become `"NaN"`, `"Infinity"`, `"-Infinity"`.

    A line is passed to the system in one write, so a killed process leaves at most one truncated
    last line, which readers skip; the next run starts on a new line. Full files are renamed to
    `records.1.jsonl`, `records.2.jsonl`, ... and the oldest beyond `keep` are deleted.

    Only one process may write to a file at a time. Its threads may share a sink, and several sinks
    may share a path. A sink that was copied to another process (by a fork or by pickling) loses and
    counts its records for as long as the first process has the file open.

    Args:
        path: The file; its folder is created.
        max_bytes: Size in bytes at which a file is full. Default: 1 GiB.
        keep: Number of full files to keep besides the current one. None: all.

    Attributes:
        lost: Number of records that could not be written.

    Raises:
        ValueError: `max_bytes` or `keep` is out of range.
        BlockingIOError: Another process writes to the file; the message names it if known.
        OSError: The file cannot be opened for writing, or is a pipe or a device.

    Example:
        >>> import tempfile, fastguard
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> with JsonLinesSink(path) as sink:
        ...     sink(fastguard.StepRecord(1, float("inf"), 1.0, "applied"))
        >>> [record.total_norm for record in fastguard.read_records(path)]
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
        self.lost: int = 0
        self._closed = False
        self._writer = LineWriter.of(path)

    def __getstate__(self) -> tuple[Path, int, int | None]:
        # A descriptor is not valid in another process, so a copy opens the file at its first write.
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
            except Exception as error:  # disks and records can fail in any way
                self.lost += 1
                if self.lost == 1:
                    log.warning("records are being lost: cannot write %s: %s", self.path, error)

    def close(self) -> None:
        """Flushes to disk and closes the file; later records are lost."""
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


def sink_of(sink: object) -> Callable[[StepRecord], object]:
    """Returns the sink for an argument of `add_sink`: a callable, or the path of a `.jsonl` file.

    Raises:
        TypeError: It is neither callable nor such a path.
        BlockingIOError, OSError: See `JsonLinesSink`.
    """
    if not isinstance(sink, str | os.PathLike):
        return check_sink(sink)
    if not os.fspath(sink).endswith(".jsonl"):
        raise TypeError(
            f"sink={shown(sink, 200)} is a path without .jsonl; name a file such as "
            "'run/records.jsonl', or pass a sink such as TensorBoardSink('run')"
        )
    return JsonLinesSink(sink)


def check_sink(sink: object) -> Callable[[StepRecord], object]:
    """Returns the sink if it is a callable and not a class; raises a TypeError otherwise."""
    if isinstance(sink, type):
        raise TypeError(
            f"sink is the class {sink.__name__}; pass an instance: add_sink({sink.__name__}(...))"
        )
    if not callable(sink):
        raise TypeError(f"sink={shown(sink, 200)} must be callable with a StepRecord")
    return sink


def check_file(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file of records, which need not exist.

    Raises:
        TypeError: The argument is not a path.
        IsADirectoryError: The path is a folder, or ends in a slash.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{path!r} is not a path for records; name a file, such as 'run/records.jsonl'"
        )
    if os.fspath(path).endswith("/") or Path(path).is_dir():
        raise folder_error(path)
    return Path(path)
