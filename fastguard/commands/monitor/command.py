"""Shows a run from its records: rate, gradient norm, losses, skips and the latest incidents.

RUN is the file of a JsonLinesSink, or the folder that contains it. The screen follows the run,
also across rotations, until Ctrl-C; --once prints the state and exits. The exit status is 1 if
there is an incident in the last N steps, 0 if there is none, 2 if --once finds no record.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import chain
from pathlib import Path

from fastguard.commands.monitor.follow import Follower
from fastguard.commands.monitor.summary import as_dict, as_text
from fastguard.commands.monitor.watch import Watch
from fastguard.commands.run_files import begun, file_of, refuse_without_records
from fastguard.commands.usage import UsageError, integer, need
from fastguard.records.strict_json import dumps

FINE, FOUND_BAD = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard monitor`."""
    parser.add_argument("path", type=Path, metavar="RUN", help="records.jsonl, or its folder")
    parser.add_argument("--once", action="store_true", help="print the state and exit")
    parser.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    parser.add_argument(
        "--last",
        type=integer(1, 1_000_000),
        default=1000,
        metavar="N",
        help="steps covered by the counts and the exit status (%(default)s)",
    )
    parser.add_argument("--wait", action="store_true", help="wait for a run that has not started")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="between two updates (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Shows the run once, or until Ctrl-C."""
    if args.json and not args.once:
        raise UsageError("--json prints once; add --once")
    if not args.wait:
        file_of(args.path)  # report wrong use before taking over the screen
    watch = _once(args) if args.once else _live(args)
    if watch.latest is None and (watch.damaged or args.once):
        refuse_without_records(file_of(args.path), watch.damaged)
    return FOUND_BAD if watch.incidents_in_window else FINE


def _once(args: argparse.Namespace) -> Watch:
    while args.wait and not begun(args.path):
        time.sleep(args.interval)
    path = file_of(args.path)
    watch, age = _read(path, args.last)
    while args.wait and watch.latest is None and not watch.damaged:
        time.sleep(args.interval)
        watch, age = _read(path, args.last)
    if watch.latest is not None or (args.json and not watch.damaged):
        told = as_dict(path, watch, age) if args.json else as_text(path, watch, age)
        print(dumps(told, indent=2) if args.json else told)
    return watch


def _read(path: Path, last: int) -> tuple[Watch, float | None]:
    """The run, and the seconds since it was last written to."""
    follower = Follower(path)
    watch = Watch(last)
    watch.catch_up(chain(follower.poll(), follower.finish()))
    age = follower.age(time.time())
    follower.close()
    return watch, age


def _live(args: argparse.Namespace) -> Watch:
    need("rich", extra="cli")
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise UsageError("stdout is not a terminal; use --once in scripts")
    from fastguard.commands.monitor.live import watch_live

    watch = watch_live(args.path, args.last, args.interval)
    if watch.latest is not None:
        print(as_text(args.path, watch, None))
    return watch


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{value:g} is not in 0.05 ... 3600")
    return value
