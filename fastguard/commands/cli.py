"""The command `fastguard`: a table of commands, each a module of its own.

Exit status: 0 fine, 1 found something bad, 2 wrong use. Wrong use is one line on stderr, never a
traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastguard import __version__
from fastguard.commands.parsing import Parser
from fastguard.commands.standard_output import lasting_output
from fastguard.commands.usage import UsageError
from fastguard.errors.plain_text import printable
from fastguard.records.regular_files import NotRegularFile

FINE, FOUND_BAD, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Command:
    """One entry of the command line.

    Attributes:
        name: What the user types.
        help: One line for `fastguard --help`; the module's docstring is the command's own help.
        module: Where its `add_arguments(parser)` and `run(args) -> exit status` live. It is
            imported when the command is used, so a command costs the others nothing.
    """

    name: str
    help: str
    module: str

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


COMMANDS = (
    Command(
        "demo",
        "train a small GPT through faults: bare, clipped, guarded",
        "fastguard.commands.demo.command",
    ),
    Command(
        "ckpt",
        "which checkpoints are good, and going back to one",
        "fastguard.commands.ckpt.command",
    ),
    Command(
        "diagnose",
        "what is wrong with a model, its data and its optimizer",
        "fastguard.commands.diagnose.command",
    ),
    Command("monitor", "a run's records, live or once", "fastguard.commands.monitor.command"),
    Command("scan", "NaN and Inf in the text logs of trainers", "fastguard.commands.scan.command"),
    Command(
        "report", "a run's records as one page, with a verdict", "fastguard.commands.report.command"
    ),
    Command(
        "env", "versions, devices, and which backend serves each", "fastguard.commands.environment"
    ),
    Command(
        "selftest",
        "the kernels of this machine against the reference",
        "fastguard.commands.selftest",
    ),
    Command(
        "bench", "what guarding a step costs on this machine", "fastguard.commands.bench.command"
    ),
)


class _CommandParser(Parser):
    """A parser that asks its command for the arguments when it is chosen, and not before."""

    def __init__(self, *, command: Command, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._command: Command | None = command

    def load(self) -> None:
        """Asks the command for its arguments, once."""
        if self._command is None:
            return
        module, self._command = self._command.load(), None
        self.description = module.__doc__
        module.add_arguments(self)
        self.set_defaults(run=module.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.load()
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown and "_ARGCOMPLETE" not in os.environ:
            # Said here, with the usage of the command; argparse would show the table's.
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser() -> tuple[argparse.ArgumentParser, dict[str, _CommandParser]]:
    """The parser of the table, and those of the commands by name."""
    parser = Parser(
        prog="fastguard",
        description="Keep PyTorch training finite, at the speed of memory.",
        epilog="Exit status: 0 fine, 1 found something bad, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"fastguard {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="name", metavar="COMMAND", parser_class=_CommandParser
    )
    for command in COMMANDS:
        commands.add_parser(command.name, help=command.help, command=command)
    return parser, commands.choices  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments after the program's name; None: those of this process.

    Returns:
        The exit status.

    Example:
        >>> main(["env", "--no-such-option"])
        2
    """
    with lasting_output():
        try:
            parser, commands = _parser()
            _complete(parser, commands)
            args = parser.parse_args(argv)
        except SystemExit as stop:  # argparse has said what was wrong, or has printed the help
            return int(stop.code or 0)
        if args.name is None:
            parser.print_help(sys.stderr)
            return WRONG_USE
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except NotRegularFile as error:
        name = printable(f"{error.filename} {error.strerror}")
        print(f"fastguard {args.name}: {name}", file=sys.stderr)
        return WRONG_USE
    except (UsageError, OSError) as error:
        print(f"fastguard {args.name}: {printable(str(error))}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"\nfastguard {args.name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _complete(parser: argparse.ArgumentParser, commands: Mapping[str, _CommandParser]) -> None:
    """Answers the shell where it asks for completions, with `argcomplete`, and ends the process."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete  # pyright: ignore[reportMissingImports]
    except ImportError:  # the argcomplete of another interpreter asks
        raise SystemExit(FINE) from None
    for word in os.environ.get("COMP_LINE", "").split()[1:2]:
        if word in commands:  # argcomplete looks at the arguments before anything is parsed
            commands[word].load()
    argcomplete.autocomplete(parser)
