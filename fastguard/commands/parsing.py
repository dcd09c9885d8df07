"""The argument parser: suggests the nearest name after a typo and keeps paragraphs in help."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NoReturn

from fastguard.errors import did_you_mean
from fastguard.errors.plain_text import printable

_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", re.DOTALL)
_OPTION = re.compile(r"unrecognized arguments: (?:.* )?(--?[\w-]+)")


class Paragraphs(argparse.HelpFormatter):
    """Wraps each paragraph of a description to the width of the terminal.

    Paragraphs whose first line is indented (tables, commands) are kept as written.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip("\n").split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width)
            for part in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line that suggests the nearest command or option."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", Paragraphs)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, then exits with status 2."""
        if choice := _CHOICE.search(message):
            message += did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        elif option := _OPTION.search(message):
            message += did_you_mean(option[1], list(options_of(self)))
        super().error(printable(message))


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The long options of a parser and its subparsers."""
    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from options_of(subparser)
