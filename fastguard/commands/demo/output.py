"""Printing to a reader that may leave: `fastguard demo | head` still writes its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
def outlasting_readers() -> Iterator[None]:
    """Inside, stdout and stderr may lose their readers, and the work goes on."""
    stdout, stderr = Outlasting(sys.stdout), Outlasting(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr):  # type: ignore[type-var]
        yield
        stdout.flush()
