"""What can be wrong with a checkpoint, a store, or the disk under them."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, found, read or rolled back; the message says what to do."""


class DamagedFile(CheckpointError):
    """A file is truncated, changed on disk, or in no format that is known here."""


class UnsafeFile(CheckpointError):
    """A file asks to call a function that no checkpoint needs; nothing of it was executed."""


class StoreLocked(CheckpointError):
    """Another process, or another `CheckpointStore` of this one, writes to the directory."""
