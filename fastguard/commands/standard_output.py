"""Lets commands finish although a pipe was closed or an encoding lacks a character.

`fastguard demo | head` still writes its files, and `fastguard ckpt verify runs | head -1` still
reads everything and returns the right exit status.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Any, TextIO


class PipeSafeStream:
    """A text stream that silently discards output once its reader has closed the pipe.

    Args:
        stream: The stream to write to. Everything except `write` and `flush` is delegated to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` and returns its length, even if the text was discarded."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            # Redirects the descriptor and not only this object, so that buffered text and the
            # output of child processes are discarded too.
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)


@contextmanager
def pipe_safe_output() -> Iterator[None]:
    """Makes stdout and stderr ignore closed pipes, and escape characters not in their encoding."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    stdout, stderr = PipeSafeStream(sys.stdout), PipeSafeStream(sys.stderr)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):  # type: ignore[type-var]
            yield
            stdout.flush()
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
