"""What the logger `fastguard` shows where a program has not configured logging.

Python itself would print bare messages of level WARNING and above to stderr (`logging.lastResort`).
`LastResort` takes its place for this logger alone and adds color on a terminal. As soon as the
program adds a handler of its own, here or to the root logger, that one serves and this is silent.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

LOGGER = logging.getLogger("fastguard")

PREFIX = "fastguard: "
"""How each message of the logger begins."""

_COLORS = {logging.INFO: "36", logging.WARNING: "33", logging.ERROR: "31"}  # cyan, yellow, red


class LastResort(logging.Handler):
    """Prints to what `sys.stderr` is at the time, if no other handler does."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record, unless another handler serves it."""
        if not self.is_in_charge():
            return
        try:
            print(_colored(self.format(record), record.levelno, sys.stderr), file=sys.stderr)
        except Exception:  # a closed stream, for example; logging has its own way to tell
            self.handleError(record)

    def is_in_charge(self) -> bool:
        """Whether the program has left logging as Python starts with it."""
        if logging.lastResort is None:  # how a program turns off what nobody has configured
            return False
        others = [handler for handler in LOGGER.handlers if handler is not self]
        return not others and LOGGER.propagate and not logging.getLogger().handlers


HANDLER = LastResort()


def announce(text: str) -> None:
    """Logs at level INFO, and prints it also where nobody has configured logging.

    There the effective level is WARNING only because that is what Python starts with. Where the
    program has set a level, for the root logger or for `fastguard`, the level decides.
    """
    untouched = LOGGER.level == logging.NOTSET and logging.getLogger().level == logging.WARNING
    if LOGGER.isEnabledFor(logging.INFO) or not (untouched and HANDLER.is_in_charge()):
        LOGGER.info("%s", text)
        return
    record = LOGGER.makeRecord(LOGGER.name, logging.INFO, __file__, 0, "%s", (text,), None)
    if LOGGER.filter(record):
        HANDLER.handle(record)


def _colored(text: str, level: int, stream: TextIO) -> str:
    """The text with its prefix in color, where the stream is a terminal that has colors."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if plain or not stream.isatty() or not text.startswith(PREFIX):
        return text
    name = PREFIX.rstrip()
    return f"\x1b[{_COLORS.get(level, '33')}m{name}\x1b[0m{text[len(name) :]}"
