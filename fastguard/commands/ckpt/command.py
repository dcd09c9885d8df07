"""Verifies checkpoints and rolls back to a good one.

PATH is the directory of a CheckpointStore, a .pt, .pth, .ckpt, .bin or .safetensors file, or a
folder of such files; verify includes subfolders. Files are never unpickled. A rollback keeps a copy
of the file that it replaces.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastguard.checkpoints.errors import CheckpointError, StoreLocked
from fastguard.commands.ckpt import rollback as rollback_action
from fastguard.commands.ckpt.answer import Answer
from fastguard.commands.ckpt.listing import list_checkpoints
from fastguard.commands.ckpt.verify import verify
from fastguard.commands.parsing import Parser
from fastguard.commands.terminal import say
from fastguard.commands.usage import FOUND_BAD, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastguard ckpt`."""
    actions = parser.add_subparsers(
        dest="action", metavar="list|verify|rollback", parser_class=Parser
    )
    listing = actions.add_parser("list", help="list checkpoints: step, epoch, metric, verdict")
    verify = actions.add_parser(
        "verify", help="read everything: checksums, NaN and Inf; exit status 1 if anything is bad"
    )
    rollback = actions.add_parser("rollback", help="go back to the last good checkpoint")
    for action in (listing, verify):
        action.add_argument(
            "paths", nargs="+", type=Path, metavar="PATH", help="store, file, folder"
        )
    rollback.add_argument(
        "path", type=Path, metavar="PATH", help="store, file, or folder with a last.pt"
    )
    rollback.add_argument(
        "--to",
        metavar="WHICH",
        help="for a store: a step, best or last-clean (default); for a file: the file to copy "
        "(default: the latest good one in the same folder)",
    )
    for action in (listing, verify, rollback):
        action.add_argument("--json", action="store_true", help="print one JSON object")
    for action in (verify, rollback):
        action.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="PATTERN",
            help='tensors that are non-finite by design, such as "*.attn_mask"; may be repeated',
        )


def run(args: argparse.Namespace) -> int:
    """Runs `fastguard ckpt`; returns the exit status."""
    if args.action is None:
        raise UsageError("ckpt needs an action: list, verify or rollback")
    answer = Answer(args.json)
    try:
        if args.action == "rollback":
            path = _existing(args.path)
            return answer.end(rollback_action.run(path, args.to, args.ignore, answer))
        paths = [_existing(path) for path in args.paths]
        if args.action == "list":
            return answer.end(max(list_checkpoints(path, answer) for path in paths))
        return answer.end(max(verify(path, args.ignore, answer) for path in paths))
    except StoreLocked as error:
        # the remedy after the semicolon is for Python code
        problem, _, _ = str(error).rpartition(";")
        raise UsageError(
            f"{problem}; end that run first. The actions list and verify work while it is running"
        ) from None
    except CheckpointError as error:
        say(f"fastguard ckpt: {error}", file=sys.stderr)
        return FOUND_BAD


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path
