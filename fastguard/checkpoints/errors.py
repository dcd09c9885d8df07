"""Errors raised for checkpoints and stores."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, found, read or rolled back; the message says what to do."""


class DamagedFile(CheckpointError):
    """A file is truncated, changed on disk, or in an unknown format."""


class UnsafeFile(CheckpointError):
    """A file would call a function that no checkpoint needs; nothing was executed."""


class StoreLocked(CheckpointError):
    """Another process, or another `CheckpointStore` in this process, writes to the directory."""
