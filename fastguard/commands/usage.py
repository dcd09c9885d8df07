"""Shared helpers of the commands: exit statuses, one-line usage errors, early argument checks."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastguard.errors.plain_text import shown

FINE, FOUND_BAD, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses of the commands."""


class UsageError(Exception):
    """A command was used wrongly. The message names the wrong value and the fix, in one line."""


def need(*packages: str, extra: str) -> None:
    """Checks that optional packages can be imported; called before a command starts its work.

    Raises:
        UsageError: A package cannot be imported; the message names the extra to install.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"{error}; run: pip install 'torch-fastguard[{extra}]'") from None


def output_folder(path: str) -> Path:
    """Creates the `--out` folder if necessary and checks that it is writable.

    Raises:
        UsageError: The path is a file, or cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # a null byte in the name raises a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot write to --out {path!r}: {reason}; choose another folder"
        ) from None
    return folder


def integer(low: int, high: int, *, why: str = "") -> Callable[[str], int]:
    """An argparse type that accepts integers in `[low, high]`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not an integer") from None
        if not low <= value <= high:
            reason = f" ({why})" if why else ""
            raise argparse.ArgumentTypeError(
                f"{shown(value)} is not between {low} and {high}{reason}"
            )
        return value

    return parse
