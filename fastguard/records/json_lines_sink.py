"""`JsonLinesSink`, and the checks of the argument of `opt.add_sink(sink)`.

A sink is a callable that takes one `StepRecord`. It is called once per step, in order, when the
record of the step has reached the host. If a sink raises an error, the run goes on: lost records
are counted, and one warning is logged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastguard.errors.checked_numbers import count_of
from fastguard.errors.logger import log
from fastguard.errors.plain_text import shown
from fastguard.records.line_writer import LineWriter
from fastguard.records.regular_files import folder_error
from fastguard.records.run_header import device_text, header_line
from fastguard.records.step_record import StepRecord
from fastguard.records.strict_json import encode


class JsonLinesSink:
    """Appends one JSON object per line; NaN and Inf become `"NaN"`, `"Infinity"`, `"-Infinity"`.

    A line is written with one system call, so a killed process leaves at most one truncated last
    line, which readers skip; the next run starts on a new line. Full files are renamed to
    `records.1.jsonl`, `records.2.jsonl`, ..., and only the newest `keep` full files are kept.

    Every file begins with a header, a line with versions, host, device and settings; see
    docs/loggers.md. Readers of fastguard skip the header.

    Only one process may write to a file at a time. Its threads may share a sink, and several sinks
    may share a path. A sink that was copied to another process (by a fork or by pickling) cannot
    write while the first process has the file open; it counts its records as lost.

    Args:
        path: The file; its folder is created.
        max_bytes: Size in bytes at which a file is full. Default: 1 GiB.
        keep: Number of full files to keep besides the current one. None: all.
        name: Name of the run, for the header, the report and the monitor. Default: None.
        host: Whether the header has the name of this machine. Default: True.

    Attributes:
        lost: Number of records that could not be written.

    Raises:
        TypeError: `name` is not a string, or `host` is not a bool.
        ValueError: `max_bytes` or `keep` is out of range.
        BlockingIOError: Another process writes to the file; the message names the process if it is
            known.
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
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 1 << 30,
        keep: int | None = None,
        name: str | None = None,
        host: bool = True,
    ) -> None:
        count_of("max_bytes", max_bytes, 1024)
        if keep is not None:
            count_of("keep", keep, 0, optional=True)
        if not isinstance(name, str | None):
            raise TypeError(f"name={shown(name)} must be the name of the run, a string")
        if not isinstance(host, bool):
            raise TypeError(f"host={shown(host)} must be True or False")
        self._set_up(check_file(path), max_bytes, keep, name, host)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._writer.open()
        except BaseException:
            self._writer.leave()
            raise

    def _set_up(
        self, path: Path, max_bytes: int, keep: int | None, name: str | None, host: bool
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.keep = keep
        self.name = name
        self.host = host
        self._start = time.time()
        self._guards: list[str] = []
        self._device: str | None = None
        self._header = b""  # the header line; empty until it is first needed
        self._begins = True  # whether the header has not been written yet
        self.lost: int = 0
        self._closed = False
        self._writer = LineWriter.of(path)

    def __getstate__(self) -> tuple[Path, int, int | None, str | None, bool]:
        # A file descriptor is not valid in another process, so a copy opens the file itself.
        return self._writer.path, self.max_bytes, self.keep, self.name, self.host

    def __setstate__(self, state: tuple[Path, int, int | None, str | None, bool]) -> None:
        self._set_up(*state)

    def add_guard(self, description: str, device: torch.device) -> None:
        """Adds an optimizer to the header, which is written before the next record.

        `GuardedOptimizer.add_sink` calls this.

        Args:
            description: `GuardedOptimizer.describe()`.
            device: The device that decides its steps.
        """
        with self._writer.lock:
            self._guards.append(description)
            self._device = device_text(device)
            self._header, self._begins = b"", True

    def __call__(self, record: StepRecord) -> None:
        with self._writer.lock:
            try:
                if self._closed:
                    raise OSError("the sink is closed")
                line = encode(record.as_dict()) + "\n"
                if not self._header:
                    self._header = self._new_header()
                self._writer.append(
                    line.encode(),
                    self.max_bytes,
                    self.keep,
                    header=self._header,
                    begins=self._begins,
                )
                self._begins = False
            except Exception as error:  # the disk or the record may cause any error
                self.lost += 1
                if self.lost == 1:
                    log.warning("records are being lost: cannot write %s: %s", self.path, error)

    def _new_header(self) -> bytes:
        return header_line(
            name=self.name,
            time=self._start,
            host=self.host,
            device=self._device,
            guards=self._guards,
        )

    def close(self) -> None:
        """Flushes to disk and closes the file. Later records are lost."""
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


def tell_guard(sink: object, description: str, device: torch.device) -> None:
    """Adds a guard to the header of a sink, if the sink writes one; see `JsonLinesSink`."""
    if isinstance(sink, JsonLinesSink):
        sink.add_guard(description, device)


def sink_of(sink: object) -> Callable[[StepRecord], object]:
    """Returns the sink for an argument of `add_sink`: a callable, or the path of a `.jsonl` file.

    Raises:
        TypeError: The argument is neither callable nor a path that ends in `.jsonl`.
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
