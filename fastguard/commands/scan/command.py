"""Finds NaN and Inf in training logs, by epoch and batch, and losses that spike or climb.

The command understands the progress lines of Ultralytics, the dicts of Hugging Face's Trainer, the
bars of Lightning and tqdm, free-form lines, and structured logs: trainer_state.json, JSON lines,
CSV and TSV with a header, TensorBoard event files. LOG is a file, optionally gzipped, or - for
standard input. Words like "info" or "nano" are not matches, and "no nan found" is only noted.

The time is bounded, to about 0.2 s and 50 ms per MB: if the wording around NaN and Inf
never repeats, only the first few thousand lines are analyzed. All other lines are searched for
these words and counted, and the output reports their number. With --full, every line is analyzed.

The exit status is 1 if NaN, Inf, a spike or steady growth was found. It is 2 if nothing was found,
but a log is empty, could not be read to its end, or has lines that contain the words and were only
counted. Otherwise it is 0.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys

from fastguard.commands.scan.events import is_event_file
from fastguard.commands.scan.output import as_dict, print_problem, print_text
from fastguard.commands.scan.scanner import LogScan, scan_events, scan_log
from fastguard.commands.terminal import printable
from fastguard.commands.usage import UsageError
from fastguard.records.regular_files import NotRegularFile, open_regular
from fastguard.records.strict_json import dumps

FINE, FOUND_BAD, NOT_READ = 0, 1, 2
STDIN = "-"

_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/\d{1,6}|/dev/stdin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard scan`."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log file; - reads standard input")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array with an object per log"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="analyze every line, which can be as slow as 0.3 MB/s",
    )


def run(args: argparse.Namespace) -> int:
    """Scans the logs one after the other."""
    for log in args.logs:
        if log != STDIN:
            _check(log)
    scans = []
    bad = unread = False
    for log in args.logs:
        found = _scan(log, full=args.full)
        bad |= found.found
        unread |= found.problem is not None or found.counted.n_nonfinite > 0
        if args.json:
            scans.append(as_dict(log, found))
        elif found.found or found.problem is None:
            print_text(log, found)
        else:
            print_problem(log, found)
    if args.json:
        print(dumps(scans, indent=2))
    return FOUND_BAD if bad else NOT_READ if unread else FINE


def _check(log: str) -> None:
    """Checks a path without opening it.

    Opening a FIFO would block, and a device has no end.

    Raises:
        UsageError: The path is neither a regular file nor a pipe given to this process
            (`<(command)`).
    """
    name = printable(log)
    try:
        mode = os.stat(log).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no such file: {name}") from None
    except ValueError:  # a null byte in the name
        raise UsageError(f"no such file: {name!r}") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{name} is a folder; pass the logs in it")
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and _is_descriptor(log)):
        raise UsageError(
            f"{name} is not a regular file; pass a log, or pipe it in: fastguard scan - < {name}"
        )


def _is_descriptor(log: str) -> bool:
    """Whether a path refers to an open file of this process, as the shell's `<(command)` does."""
    return _DESCRIPTOR.fullmatch(log) is not None


def _scan(log: str, *, full: bool) -> LogScan:
    if log == STDIN:
        return scan_log(sys.stdin.buffer, full=full)
    try:
        with open(log, "rb") if _is_descriptor(log) else open_regular(log) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and is_event_file(file):
                return scan_events(log)
            return scan_log(file, name=os.path.basename(log), full=full)
    except NotRegularFile as error:
        return LogScan(problem=f"the log {error.strerror}")
    except OSError as error:
        return LogScan(problem=f"the log cannot be read: {error.strerror}")
