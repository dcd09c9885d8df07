"""Finds NaN and Inf in the logs of trainers, by epoch and batch, and where a loss spiked or climbs.

Understood are the progress lines of Ultralytics, the dicts of Hugging Face's Trainer, the bars of
Lightning and of tqdm, lines that people print, and logs that are data: trainer_state.json, JSON
lines, CSV and TSV with a head, TensorBoard event files. LOG is a file, gzip or not, or - for
standard input. Words such as "info" or "nano" are nothing, and "no nan found" is a note.

Exit status 1 if a NaN, an Inf, a spike or steady growth was found, 2 if none was and a log could
not be read to its end, or is empty.
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
from fastguard.records.strict_json import dumps

FINE, FOUND_BAD, NOT_READ = 0, 1, 2
STDIN = "-"

_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/\d{1,6}|/dev/stdin")
_NO_FILE = LogScan(problem="it is no regular file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastguard scan`."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log; - is standard input")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array, an object for each log"
    )


def run(args: argparse.Namespace) -> int:
    """Scans the logs one after the other."""
    for log in args.logs:
        if log != STDIN:
            _check(log)
    scans = []
    bad = unread = False
    for log in args.logs:
        found = _scan(log)
        bad |= found.found
        unread |= found.problem is not None
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
    """Opens nothing, so that no FIFO waits for a writer and no device is read without an end.

    Raises:
        UsageError: It is no regular file, nor a pipe that this process was given (`<(command)`).
    """
    name = printable(log)
    try:
        mode = os.stat(log).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no such file: {name}") from None
    except ValueError:  # a null byte in the name
        raise UsageError(f"no such file: {name!r}") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{name} is a folder; name the logs in it")
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and _is_descriptor(log)):
        raise UsageError(
            f"{name} is no regular file; name a log, or pipe one in: fastguard scan - < {name}"
        )


def _is_descriptor(log: str) -> bool:
    """Whether a name is that of an open file of this process, as the shell's `<(command)` gives."""
    return _DESCRIPTOR.fullmatch(log) is not None


def _scan(log: str) -> LogScan:
    if log == STDIN:
        return scan_log(sys.stdin.buffer)
    try:
        # What was a file when it was checked may be a FIFO now: opening one waits for a writer.
        descriptor = os.open(log, os.O_RDONLY | (0 if _is_descriptor(log) else os.O_NONBLOCK))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return scan_log(file) if _is_descriptor(log) else _NO_FILE
            if is_event_file(file):
                return scan_events(log)
            return scan_log(file)
    except OSError as error:
        return LogScan(problem=f"it cannot be read: {error.strerror}")
