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
from fastguard.commands.monitor.run_state import RunState
from fastguard.commands.monitor.summary import as_dict, as_text
from fastguard.commands.run_files import raise_no_records, records_file, run_exists
from fastguard.commands.usage import FINE, FOUND_BAD, UsageError, integer, need
from fastguard.records.strict_json import dumps


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
        help="time between two updates (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Shows the run once, or until Ctrl-C."""
    if args.json and not args.once:
        raise UsageError("--json prints once; add --once")
    if not args.wait:
        records_file(args.path)  # reports usage errors before taking over the screen
    state = _once(args) if args.once else _live(args)
    if state.latest is None and (state.damaged or args.once):
        raise_no_records(records_file(args.path), state.damaged)
    return FOUND_BAD if state.incidents_in_window else FINE


def _once(args: argparse.Namespace) -> RunState:
    while args.wait and not run_exists(args.path):
        time.sleep(args.interval)
    path = records_file(args.path)
    state, age = _read(path, args.last)
    while args.wait and state.latest is None and not state.damaged:
        time.sleep(args.interval)
        state, age = _read(path, args.last)
    if state.latest is not None or (args.json and not state.damaged):
        if args.json:
            print(dumps(as_dict(path, state, age), indent=2))
        else:
            print(as_text(path, state, age))
    return state


def _read(path: Path, last: int) -> tuple[RunState, float | None]:
    """Reads the run; returns it and the seconds since its file was last written."""
    follower = Follower(path)
    state = RunState(last)
    state.catch_up(chain(follower.poll(), follower.finish()))
    age = follower.age(time.time())
    follower.close()
    return state, age


def _live(args: argparse.Namespace) -> RunState:
    need("rich", extra="cli")
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise UsageError("stdout is not a terminal; use --once in scripts")
    from fastguard.commands.monitor.live import watch_live

    state = watch_live(args.path, args.last, args.interval)
    if state.latest is not None:
        print(as_text(args.path, state, None))
    return state


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{value:g} is not between 0.05 and 3600")
    return value
