"""The names that a store assigns to its checkpoints; it never touches other files."""

from __future__ import annotations

import re
from typing import NamedTuple

FILE = ".pt"
FOLDER = ".sharded"
"""Suffixes of checkpoints: a `torch.save` file, and a folder of shards."""
REPLACED = ".replaced"
"""Suffix of a checkpoint that a rollback set aside."""

# [0-9] instead of \d, which matches the digits of every script.
_CHECKPOINT = re.compile(
    rf"step-(?P<step>[0-9]+)\.(?P<serial>[0-9]+)(?:{re.escape(FILE)}|{re.escape(FOLDER)})"
)
_DIGITS = 18  # more digits do not fit in int64
MAX_NUMBER = 10**_DIGITS - 1
"""Largest step and serial number in a name."""


class CheckpointName(NamedTuple):
    """The information in the name of a checkpoint."""

    step: int
    serial: int


def file_name(step: int, serial: int, suffix: str) -> str:
    """Builds the name of a checkpoint; names sort by step and are never reused."""
    return f"step-{step:09d}.{serial:06d}{suffix}"


def parse(name: str) -> CheckpointName | None:
    """Parses a name made by `file_name`; None for any other name.

    Example:
        >>> parse("step-000000100.000002.pt")
        CheckpointName(step=100, serial=2)
        >>> parse("../step-000000100.000002.pt") is None
        True
    """
    found = _CHECKPOINT.fullmatch(name)
    if found is None or max(len(found["step"]), len(found["serial"])) > _DIGITS:
        return None
    return CheckpointName(int(found["step"]), int(found["serial"]))
