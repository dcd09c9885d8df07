"""Checkpoints that carry a verdict: `CheckpointStore`, and a look at files that others wrote."""

from fastguard.checkpoints.errors import CheckpointError as CheckpointError
from fastguard.checkpoints.errors import DamagedFile as DamagedFile
from fastguard.checkpoints.errors import StoreLocked as StoreLocked
from fastguard.checkpoints.errors import UnsafeFile as UnsafeFile
from fastguard.checkpoints.foreign import roll_back_file as roll_back_file
from fastguard.checkpoints.inspection import Inspection as Inspection
from fastguard.checkpoints.inspection import inspect as inspect
from fastguard.checkpoints.manifest import Entry as Entry
from fastguard.checkpoints.store import CheckpointStore as CheckpointStore
from fastguard.checkpoints.view import Check as Check
from fastguard.checkpoints.view import Checkpoint as Checkpoint
