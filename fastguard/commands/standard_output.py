"""Printing to a reader that may leave, in whatever encoding.

`fastguard demo | head` still writes its files, and `fastguard ckpt verify runs | head -1` still
reads everything and has the exit status that tells whether all is fine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Any, TextIO


class Outlasting:
    """A text stream that goes on in silence when nobody reads it any more.

    Args:
        stream: Where to write; all but `write` and `flush` is its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            # The descriptor and not only this object: what is still in its buffer, and what other
            # processes write, goes the same way.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, stdout and stderr may lose their readers, and the work goes on.

    A character that a stream has no code for, such as é in ASCII, is escaped.
    """
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    stdout, stderr = Outlasting(sys.stdout), Outlasting(sys.stderr)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):  # type: ignore[type-var]
            yield
            stdout.flush()
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
