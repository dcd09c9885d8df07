"""Text from files on its way to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line, each control character as `?`: what a file holds commands no terminal.

    Example:
        >>> printable("loss" + chr(27) + "[2J nan" + chr(9) + "é")
        'loss?[2J nan é'
    """
    text = text.replace("\t", " ")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
