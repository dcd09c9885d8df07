"""Makes untrusted text safe to print: names in files, tags, messages of other libraries.

Such text may contain escape codes that clear a screen, line breaks that forge a line of output,
direction overrides that print a line backwards, or bytes that a stream cannot encode. The `str` of
an object may also raise an error. This module turns such text into one line of plain characters,
before it reaches a terminal, a log or an error message. All messages of the logger `fastguard` are
treated this way.
"""

from __future__ import annotations

import logging
import traceback
import unicodedata
from collections.abc import Callable

from fastguard.errors.logger import HANDLER, PREFIX, log


def printable(text: str, limit: int | None = None) -> str:
    """Returns the text in one line, with unprintable characters escaped as in `repr`.

    Args:
        text: Any string, including lone surrogates.
        limit: Maximum number of characters, with `…` in place of the rest; None: no limit.

    Example:
        >>> print(printable("loss" + chr(27) + "[2J nan" + chr(9) + "é" + chr(10) + "ok"))
        loss\\x1b[2J nan é\\nok
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    text = text.replace("\t", " ")
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return " " if unicodedata.category(character) == "Zs" else repr(character)[1:-1]


def _bounded_repr(value: object, room: int) -> str:
    """Returns the `repr` of a value, or a prefix of it that is longer than `room`.

    A short pickle or YAML file can describe a list that holds another list a thousand times, and so
    on for several levels. The whole `repr` of such a list would be too long to create.
    """
    kind = type(value)
    form = _BRACKETS.get(kind.__repr__)
    if form is None or not isinstance(value, list | tuple | dict) or not value:
        return repr(value[: room + 1] if kind in (str, bytes) else value)  # type: ignore[index]
    if room < 0:
        return "…"
    text, separator = form[0], ""
    for item in value:
        text += separator + _bounded_repr(item, room - len(text))
        if kind.__repr__ is dict.__repr__ and len(text) <= room:
            text += ": " + _bounded_repr(dict.__getitem__(value, item), room - len(text))  # type: ignore[arg-type, index]
        if len(text) > room:
            return text
        separator = ", "
    return text + ("," if form[0] == "(" and len(value) == 1 else "") + form[1]


_BRACKETS = {list.__repr__: "[]", tuple.__repr__: "()", dict.__repr__: "{}"}


def shown(value: object, limit: int = 60, form: Callable[[object], str] = repr) -> str:
    """Returns the `repr` (or another `form`) of any object, printable and shortened. Never raises.

    At any depth of lists, tuples and dicts, only the part that is shown is formatted.

    Example:
        >>> shown([1, "a"]), shown("x" * 1000, limit=4)
        ("[1, 'a']", "'xx…")
        >>> shown(10**5000)
        'an integer of 16610 bits'
    """
    try:
        text = _bounded_repr(value, limit) if form is repr else form(value)
    except Exception as error:  # the `repr` of a class may raise any error
        if type(value) is int:  # Python refuses to print more than 4300 digits
            return f"an integer of {value.bit_length()} bits"
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    return printable(text, limit)


class _OneLine(logging.Filter):
    """Makes the message of each log record one printable line that begins with `fastguard:`, and
    its traceback printable.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        # Keeps the template separate, since log services group messages by the template.
        record.msg = f"{PREFIX}{record.msg}"
        try:
            message = record.getMessage()
        except Exception as error:  # a logging handler would not catch a RecursionError
            problem = f"{type(error).__name__} in showing the values"
            record.msg, record.args = f"{record.msg} ({problem})", None
            message = record.getMessage()
        if not message.isprintable():
            record.msg, record.args = printable(message), None
        if record.exc_info and record.exc_info[1] is not None:
            # Formatters print this text instead of formatting the exception.
            parts = map(_traceback_part, traceback.format_exception(record.exc_info[1]))
            record.exc_text = "\n".join(parts)
        return True


def _traceback_part(part: str) -> str:
    """Returns one part of a formatted traceback: the lines of a frame, or the exception message."""
    part = part.strip("\n")
    if part.startswith("  "):
        return "\n".join(map(printable, part.split("\n")))
    return printable(part)


log.addFilter(_OneLine())
log.addHandler(HANDLER)
