"""Runs programs in processes that have already imported torch and fastguard.

A new interpreter takes 2 to 4 s of CPU time until a guarded optimizer has taken its first step.
Here, as in `guardtest.ranks`, a process is forked from a server that has already imported the
modules that nearly all programs need. Use `subprocess` instead if a test is about imports, or about
the start or end of the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from guardtest.ranks import fork_context


def run_program(
    code: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    terminal: str | None = None,
    check: bool = False,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Runs Python code as `python -c code *arguments`.

    Args:
        code: The program.
        arguments: Its `sys.argv[1:]`, as strings.
        env: Variables in addition to those of this process.
        terminal: Path of a terminal to use as stderr. If None, stderr is returned.
        check: Whether an exit status other than 0 raises `CalledProcessError`.
        timeout: Time limit in seconds, after which it is killed.

    Returns:
        Its exit status, stdout and stderr.
    """
    command = ["-c", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        err.touch()
        process = fork_context().Process(
            target=_run,
            args=(code, command, environment, os.getcwd(), str(out), terminal or str(err)),
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        status = process.exitcode
        process.close()
        done = subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())
    if check:
        done.check_returncode()
    return done


def _run(
    code: str, argv: list[str], environment: dict[str, str], folder: str, out: str, err: str
) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
