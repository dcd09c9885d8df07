"""Verified checkpoints: `CheckpointStore`, and tools for files that other programs wrote."""

from fastguard.checkpoints.entry import Entry as Entry
from fastguard.checkpoints.errors import CheckpointError as CheckpointError
from fastguard.checkpoints.errors import DamagedFile as DamagedFile
from fastguard.checkpoints.errors import StoreLocked as StoreLocked
from fastguard.checkpoints.errors import UnsafeFile as UnsafeFile
from fastguard.checkpoints.foreign_files import roll_back_file as roll_back_file
from fastguard.checkpoints.reader import Check as Check
from fastguard.checkpoints.reader import Checkpoint as Checkpoint
from fastguard.checkpoints.reading.inspect_file import Inspection as Inspection
from fastguard.checkpoints.reading.inspect_file import inspect as inspect
from fastguard.checkpoints.store import CheckpointStore as CheckpointStore
