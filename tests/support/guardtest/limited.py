"""Runs commands in a process with limits of 2 GB of additional memory and a few seconds.

The limits are set after the imports, because torch alone maps gigabytes of address space. An audit
hook records every file that a command writes or removes, and every program that it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # bytes more than the process has after its imports
CPU_SECONDS = 10  # for each command

_PRELUDE = """
import contextlib, io, json, os, resource, signal, sys, time
import torch.distributed.checkpoint, torch.distributed.tensor
from fastguard.commands.cli import main
from guardtest import limited

MEMORY, CPU_SECONDS = {memory}, {cpu_seconds}
main(["ckpt", "list", {warm!r}])
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, -1))
events = limited.watched()


def too_slow(*_):
    raise SystemExit(f"more than {{CPU_SECONDS}} s")


signal.signal(signal.SIGPROF, too_slow)


def run(arguments):
    del events[:]
    out = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    begun = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(arguments)
    except BaseException as error:
        status = f"{{type(error).__name__}}: {{error}}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - begun
    return {{"status": status, "said": out.getvalue()[:2000], "seconds": seconds,
             "events": list(events)}}


"""

# Audit events of a process that changes files, runs programs or uses the network.
_CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "ctypes.dlopen", "pickle.find_class",
)  # fmt: skip


def watched() -> list[list[str]]:
    """Records all later effects of this process on files and processes, as `[event, path]`."""
    events: list[list[str]] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                events.append([event, str(path)])
        elif event in _CHANGES:
            events.append([event, *map(str, arguments[:2])])

    sys.addaudithook(hook)
    return events


def run_limited(
    body: str, folder: Path, *arguments: object, seconds: int = 500, memory: int = MEMORY
) -> list[dict[str, Any]]:
    """Runs a script that calls `run(["ckpt", ...])` for the effects of a command.

    Args:
        body: The script; it prints one JSON object per line.
        folder: An empty folder for files that are needed before the limits are set.
        *arguments: Arguments of the script, in `sys.argv`.
        seconds: Time limit, after which it is killed.
        memory: Limit in bytes of the memory allocated after its imports.
    """
    import torch

    torch.save({"w": torch.ones(3)}, folder / "warm.pt")
    prelude = _PRELUDE.format(memory=memory, cpu_seconds=CPU_SECONDS, warm=str(folder / "warm.pt"))
    done = subprocess.run(
        [sys.executable, "-c", prelude + body, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def verified(
    paths: Sequence[Path], folder: Path, *, over: Callable[[Path], int] = lambda path: 1
) -> dict[str, dict[str, Any]]:
    """Returns the effects of `ckpt verify` on each file, by the name of the file.

    Args:
        paths: The files.
        folder: As in `run_limited`.
        over: Divisor of the budgets of `verify` and of the limits above, to save time.
    """
    arguments = (text for path in paths for text in (over(path), path))
    found = run_limited(_VERIFY, folder, *arguments)
    return {Path(one["path"]).name: one for one in found}


_VERIFY = """
from fastguard.checkpoints.reading import bounded_reader, nonfinite_spans

seconds, whole = CPU_SECONDS, (MEMORY, bounded_reader.BUDGET, nonfinite_spans.LEAST_WORK)
for over, path in zip(map(int, sys.argv[1::2]), sys.argv[2::2]):
    CPU_SECONDS = seconds / over
    memory, bounded_reader.BUDGET, nonfinite_spans.LEAST_WORK = (
        number // over for number in whole
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, -1))
    print(json.dumps({"path": path, **run(["ckpt", "verify", path])}))
"""
