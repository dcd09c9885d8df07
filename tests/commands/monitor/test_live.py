"""The live screen in a pseudo-terminal follows a run, resizes, and handles Ctrl-C and SIGTERM."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastguard import JsonLinesSink, StepRecord

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def _own_terminal() -> None:
    """Makes Ctrl-C a signal in the child; in a background job it would be ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`fastguard monitor` with a pseudo-terminal for its standard streams."""

    def __init__(self, *args: object) -> None:
        self.master, slave = pty.openpty()
        self.resize(24, 80)
        command = [sys.executable, "-m", "fastguard", "monitor", *map(str, args)]
        # Readline exports the size of the terminal in which the tests run.
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, "--interval", "0.1"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**env, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
        )
        os.close(slave)
        self.output = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def screen(self) -> list[str]:
        """The rows of the last complete frame."""
        frames = self.output.split(ENTER, 1)[-1].split("\x1b[H")
        return [ANSI.sub("", row).rstrip() for row in frames[-1].split("\r\n")]

    def see(self, condition: Callable[[list[str]], bool], seconds: float = 60.0) -> list[str]:
        """Waits for a frame that meets the condition."""
        until = time.monotonic() + seconds
        while not condition(self.screen):
            assert self._read(until - time.monotonic()), f"never seen; last:\n{self.output[-4000:]}"
        return self.screen

    def end(self) -> int:
        """Reads to the end; returns the exit status."""
        while self._read(60.0):
            pass
        return self.process.wait(60)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # raised on Linux when the other end is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def begin(*args: object) -> Terminal:
        started.append(Terminal(*args))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def record(step: int, **fields: object) -> StepRecord:
    return StepRecord(step, 0.5 + step % 3, 1.0, lr=1e-3, **{"action": "applied", **fields})  # type: ignore[arg-type]


def skipped(step: int) -> StepRecord:
    return record(
        step,
        action="skipped",
        reason="nonfinite_grad",
        nan=2,
        culprits=(("head.weight", 2, 0, 0),),
        n_culprits=1,
        consecutive_skips=1,
    )


def has(*texts: str) -> Callable[[list[str]], bool]:
    return lambda rows: all(any(text in row for row in rows) for text in texts)


def test_the_screen_follows_a_run_from_before_its_start_until_ctrl_c(tmp_path: Path, start) -> None:
    terminal = start(tmp_path / "run", "--wait", "--last", "50")
    terminal.see(has("waiting for the file"))
    with JsonLinesSink(tmp_path / "run" / "records.jsonl", max_bytes=4000) as sink:
        sink(record(1, losses={"seg": 0.25}))
        terminal.see(has("step 1 ", "no incident in the last 1 step", "seg", "0.25"))
        for step in range(2, 80):
            sink(record(step, losses={"seg": 0.25}))
            time.sleep(0.02)  # slow enough for a visible rate, over several rotations
        sink(skipped(80))
        rows = terminal.see(has("step 80 "))
        assert has("1 incident in the last 50 steps", "skipping now", "head.weight (2 NaN)")(rows)
        assert has("1 incident in 80 steps", "49 applied, 1 skipped")(rows)
        (rate,) = re.findall(r"([\d.]+) steps/s", "\n".join(rows))
        assert 1 < float(rate) <= 50

        terminal.resize(7, 40)
        drawn = len(terminal.output)
        sink(record(81))

        def fits(rows: list[str]) -> bool:  # an older frame may still arrive
            whole_frames = terminal.output[drawn:].split("\x1b[H")[1:-1]
            return any("step 81 " in f and len(f.split("\r\n")) <= 7 for f in whole_frames)

        rows = terminal.see(fits)
        assert max(len(row) for row in rows) <= 40

        (tmp_path / "run" / "records.jsonl").write_text('{"cut off\n')  # replaced by an editor
        terminal.see(has("1 damaged line"))
    os.write(terminal.master, b"\x03")
    assert terminal.end() == 1
    left = terminal.output.rpartition(LEAVE)[2]
    assert SHOW_CURSOR in terminal.output and terminal.output.count(ENTER) == 1
    assert "1 incident in the last 50 steps, the latest at step 80" in left
    assert "Traceback" not in terminal.output


def test_sigterm_restores_the_terminal(tmp_path: Path, start) -> None:
    with JsonLinesSink(tmp_path / "r.jsonl") as sink:
        sink(record(1))
    terminal = start(tmp_path)
    terminal.see(has("step 1 "))
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert LEAVE in terminal.output and SHOW_CURSOR in terminal.output
    assert "Traceback" not in terminal.output
