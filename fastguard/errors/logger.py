"""The logger `fastguard`, which prints its messages if the program has not configured logging.

In that case, Python itself would print messages of level WARNING and above to stderr
(`logging.lastResort`). `LastResort` replaces this output for the logger `fastguard`, with colors on
a terminal. As soon as the program adds a handler to this logger or to the root logger, `LastResort`
prints nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

log: logging.Logger = logging.getLogger("fastguard")

PREFIX = "fastguard: "
"""Prefix of each message of the logger."""

_COLORS = {logging.INFO: "36", logging.WARNING: "33", logging.ERROR: "31"}  # cyan, yellow, red


class LastResort(logging.Handler):
    """Prints to the current `sys.stderr`, unless another handler is configured."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record, unless another handler is configured."""
        if not self.is_in_charge():
            return
        try:
            print(_colored(self.format(record), record.levelno, sys.stderr), file=sys.stderr)
        except Exception:  # for example, the stream is closed; logging reports such errors
            self.handleError(record)

    def is_in_charge(self) -> bool:
        """Whether this handler prints, because the program has not configured logging."""
        if logging.lastResort is None:  # a program disables such messages in this way
            return False
        others = [handler for handler in log.handlers if handler is not self]
        return not others and log.propagate and not logging.getLogger().handlers


HANDLER = LastResort()


def announce(text: str) -> None:
    """Logs at level INFO, and also prints the text if logging is not configured.

    A level that the program has set, for the root logger or for `fastguard`, is respected. Python's
    default level, WARNING, is not.
    """
    untouched = log.level == logging.NOTSET and logging.getLogger().level == logging.WARNING
    if log.isEnabledFor(logging.INFO) or not (untouched and HANDLER.is_in_charge()):
        log.info("%s", text)
        return
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, "%s", (text,), None)
    if log.filter(record):
        HANDLER.handle(record)


def _colored(text: str, level: int, stream: TextIO) -> str:
    """Returns the text, with a colored prefix if the stream is a terminal with colors."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if plain or not stream.isatty() or not text.startswith(PREFIX):
        return text
    name = PREFIX.rstrip()
    return f"\x1b[{_COLORS.get(level, '33')}m{name}\x1b[0m{text[len(name) :]}"
