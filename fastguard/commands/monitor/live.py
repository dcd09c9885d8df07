"""Watches a run until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live

from fastguard.commands.monitor.follow import Follower
from fastguard.commands.monitor.run_state import Rate, RunState
from fastguard.commands.monitor.screen import Screen
from fastguard.commands.run_files import records_file, run_exists


def watch_live(run: Path, last: int, interval: float) -> RunState:
    """Redraws the screen every `interval` seconds until Ctrl-C; returns the state of the run.

    Args:
        run: A file or folder, which may not exist yet.
        last: Number of records covered by the counts.
        interval: Seconds between updates.
    """
    state = RunState(last)
    screen = Screen(run, state)
    # The alternate screen restores the terminal on exit, and resizing cannot garble older output.
    live = Live(screen, console=Console(highlight=False), screen=True, auto_refresh=False)
    with _exit_on_sigterm(), live:
        try:
            follower = _wait_for_file(screen, interval, live)
            _follow(follower, screen, interval, live)
        except KeyboardInterrupt:
            pass
    return state


def _wait_for_file(screen: Screen, interval: float, live: Live) -> Follower:
    while not run_exists(screen.run):
        screen.activity = "waiting for the file"
        live.refresh()
        time.sleep(interval)
    return Follower(records_file(screen.run))


def _follow(follower: Follower, screen: Screen, interval: float, live: Live) -> None:
    state, rate = screen.state, Rate()
    screen.activity = "reading"
    live.refresh()
    try:
        state.catch_up(follower.poll())
        screen.activity = "waiting for a record"
        while True:
            for line in follower.poll():
                state.feed(line)
            screen.rate = rate.sample(time.monotonic(), state.n_records)
            screen.age = follower.age(time.time())
            live.refresh()
            time.sleep(interval)
    finally:
        follower.close()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into `SystemExit`, so that the terminal is restored."""

    def leave(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
