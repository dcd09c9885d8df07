"""The `fastguard` command: dispatches to subcommands, each in its own module.

Exit status: 0 no problem, 1 a problem was found, 2 usage error. A usage error prints one line to
stderr, never a traceback.
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
from fastguard.commands.standard_output import pipe_safe_output
from fastguard.commands.usage import FINE, INTERRUPTED, USAGE_ERROR, UsageError
from fastguard.errors.plain_text import printable
from fastguard.records.regular_files import NotRegularFile


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name: What the user types.
        help: One line for `fastguard --help`; the module's docstring is the command's own help.
        module: Module of `fastguard.commands` that defines `add_arguments(parser)` and `run(args)
            -> exit status`. It is imported only when the command is used.
    """

    name: str
    help: str
    module: str

    def load(self) -> ModuleType:
        """Imports the module of the command."""
        return importlib.import_module(f"fastguard.commands.{self.module}")


COMMANDS = (
    Command("demo", "train a small GPT through faults: bare, clipped, guarded", "demo.command"),
    Command("ckpt", "verify checkpoints and roll back", "ckpt.command"),
    Command("diagnose", "check a model, its data and its optimizer", "diagnose.command"),
    Command("monitor", "show a run's records, live or once", "monitor.command"),
    Command("scan", "find NaN and Inf in text logs", "scan.command"),
    Command("report", "summarize a run in one HTML page", "report.command"),
    Command("env", "show versions, devices and backends", "environment"),
    Command("selftest", "compare this machine's kernels with the reference", "selftest"),
    Command("bench", "measure the cost of guarding a step", "bench.command"),
)


class _CommandParser(Parser):
    """A parser that loads its command's arguments only when the command is chosen."""

    def __init__(self, *, command: Command, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._command: Command | None = command

    def load(self) -> None:
        """Adds the command's arguments; later calls do nothing."""
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
            # Reports the error here to show the command's usage; argparse would show the top-level
            # usage.
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser() -> tuple[argparse.ArgumentParser, dict[str, _CommandParser]]:
    """The top-level parser, and the command parsers by name."""
    parser = Parser(
        prog="fastguard",
        description="Keep PyTorch training finite, at the speed of memory.",
        epilog="Exit status: 0 no problem, 1 a problem was found, 2 usage error.",
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
        argv: Arguments without the program name. Default: `sys.argv[1:]`.

    Returns:
        The exit status.

    Example:
        >>> main(["env", "--no-such-option"])
        2
    """
    with pipe_safe_output():
        try:
            parser, commands = _parser()
            _complete(parser, commands)
            args = parser.parse_args(argv)
        except SystemExit as stop:  # argparse has already printed the error or the help
            return int(stop.code or 0)
        if args.name is None:
            parser.print_help(sys.stderr)
            return USAGE_ERROR
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except NotRegularFile as error:
        name = printable(f"{error.filename} {error.strerror}")
        print(f"fastguard {args.name}: {name}", file=sys.stderr)
        return USAGE_ERROR
    except (UsageError, OSError) as error:
        print(f"fastguard {args.name}: {printable(str(error))}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"\nfastguard {args.name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _complete(parser: argparse.ArgumentParser, commands: Mapping[str, _CommandParser]) -> None:
    """If there is a shell completion request, answers it through `argcomplete` and exits."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete  # pyright: ignore[reportMissingImports]
    except ImportError:  # the request came from another interpreter's argcomplete
        raise SystemExit(FINE) from None
    for word in os.environ.get("COMP_LINE", "").split()[1:2]:
        if word in commands:  # argcomplete inspects arguments before parsing
            commands[word].load()
    argcomplete.autocomplete(parser)
