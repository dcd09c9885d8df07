"""Raises an exception at a chosen line of fastguard, as Ctrl-C can."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import fastguard

HOME = str(Path(fastguard.__file__).parent)
UPDATES = str(
    Path(HOME, "optim")
)  # inside the wrapped step, which may already have changed weights


def _guards(frame: FrameType, within: str = "") -> bool:
    """Whether a frame belongs to a file of the package, except the updates of `fastguard.optim`,
    with a name that contains `within`.
    """
    name = frame.f_code.co_filename
    return name.startswith(HOME) and not name.startswith(UPDATES) and within in name


@contextmanager
def interrupted(
    at: int, error: type[BaseException] = KeyboardInterrupt, *, within: str = ""
) -> Iterator[list[str]]:
    """Raises `error` before the `at`-th line, counted from 0, that fastguard runs in the block.

    Only lines of files whose name contains `within` are counted.

    Yields:
        A list with the position `"file:line"` of the error; empty if the block was shorter.
    """
    where: list[str] = []
    left = at

    def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        nonlocal left
        if not _guards(frame, within):
            return None
        if event == "line":
            if left == 0:
                where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                left = -1
                raise error("at a line")
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)


def lines_of(work: Callable[[], object]) -> int:
    """Returns the number of lines of fastguard that a call runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        nonlocal count
        if not _guards(frame):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
