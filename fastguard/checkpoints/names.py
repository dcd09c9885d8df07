"""The names that a store gives to its checkpoints; whatever has another name is not its own."""

from __future__ import annotations

import re
from typing import NamedTuple

FILE = ".pt"
FOLDER = ".sharded"
"""How the name of a checkpoint ends: that of a file of `torch.save`, that of a folder of shards."""
REPLACED = ".replaced"
"""Stands behind the name of what a rollback put aside."""

# [0-9], since \d matches the digits of every script.
_CHECKPOINT = re.compile(
    rf"step-(?P<step>[0-9]+)\.(?P<serial>[0-9]+)(?:{re.escape(FILE)}|{re.escape(FOLDER)})"
)
_DIGITS = 18  # more do not fit an int64


class CheckpointName(NamedTuple):
    """What the name of a checkpoint says."""

    step: int
    serial: int


def file_name(step: int, serial: int, suffix: str) -> str:
    """The name of a checkpoint: sorts by step, and is never used twice."""
    return f"step-{step:09d}.{serial:06d}{suffix}"


def parse(name: str) -> CheckpointName | None:
    """What a name of `file_name` says; None for every other name.

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
