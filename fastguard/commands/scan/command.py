"""Finds NaN and Inf in the text logs of trainers, by epoch and batch.

Understood are the progress lines of Ultralytics, the dicts of Hugging Face's Trainer, the bars of
Lightning and of tqdm, CSV and TSV with a head, and lines that people print. LOG is a file, gzip or
not, or - for standard input. Words such as "info" or "nano" are nothing, and "no nan found" is a
note. Exit status 1 if a NaN or Inf was found, 2 if none was and a log could not be read to its end,
or is empty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastguard.commands.scan.output import as_dict, print_problem, print_text
from fastguard.commands.scan.scanner import LogScan, scan_log
from fastguard.commands.usage import UsageError
from fastguard.strict_json import dumps

FINE, FOUND_BAD, NOT_READ = 0, 1, 2
STDIN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastguard scan`."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a text log; - is standard input")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array, an object for each log"
    )


def run(args: argparse.Namespace) -> int:
    """Scans the logs one after the other."""
    for log in args.logs:
        if log != STDIN and not Path(log).exists():
            raise UsageError(f"no such file: {log}")
        if log != STDIN and Path(log).is_dir():
            raise UsageError(f"{log} is a folder; name the logs in it")
    scans = []
    bad = unread = False
    for log in args.logs:
        found = _scan(log)
        bad |= found.n_bad > 0
        unread |= found.problem is not None
        if args.json:
            scans.append(as_dict(log, found))
        elif found.n_bad or found.problem is None:
            print_text(log, found)
        else:
            print_problem(log, found)
    if args.json:
        print(dumps(scans, indent=2))
    return FOUND_BAD if bad else NOT_READ if unread else FINE


def _scan(log: str) -> LogScan:
    if log == STDIN:
        return scan_log(sys.stdin.buffer)
    try:
        with open(log, "rb") as file:
            return scan_log(file)
    except OSError as error:
        return LogScan(problem=f"it cannot be read: {error.strerror}")
