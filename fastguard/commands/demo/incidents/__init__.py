"""Small training runs that fail: `fastguard demo --incident A`.

Each incident is a module with a function `run(folder, guarded) -> Outcome`. Both runs use the same
weights, data and faults. The code is meant to be read and copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastguard.records.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one run.

    Attributes:
        survived: Whether the final weights, state and files are finite and the model learned.
        ended: How the run ended, in one sentence.
        losses: The loss of each batch in order, as the run itself computed it.
        records: One record per step of a guarded run, oldest first.
        facts: Further measurements of the scenario, by name.
    """

    survived: bool
    ended: str
    losses: Sequence[float]
    records: Sequence[StepRecord] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Incident:
    """One scenario.

    Attributes:
        letter: The value of `--incident`.
        title: The title, one line.
        module: Module of this package that defines `run`; imported only when it is played.
        package: The package that it requires besides torch; None: none.
        extra: The extra that installs it.
    """

    letter: str
    title: str
    module: str
    package: str | None = None
    extra: str = "cli"

    def load(self) -> ModuleType:
        """Imports the module of the incident."""
        return importlib.import_module(f"{__name__}.{self.module}")

    def run(self, folder: Path, guarded: bool) -> Outcome:
        """Runs the incident on a CPU with generated data; nothing is downloaded.

        Args:
            folder: Output folder; must be empty.
            guarded: Whether to use fastguard; otherwise the original script runs.
        """
        return self.load().run(folder, guarded)


INCIDENTS = (
    Incident("A", "The detector with NaN losses", "detector", "ultralytics", "ultralytics"),
    Incident("B", "The checkpoint that could not be trusted", "classifier"),
    Incident("C", "The segmentation model with too many heads", "segmentation"),
    Incident("D", "The model that could not learn", "adaptive_stream"),
    Incident("E", "The averages that became NaN", "latent_codes", "tensorboard", "tensorboard"),
)


def incident(letter: str) -> Incident:
    """Returns the incident with a letter.

    Raises:
        KeyError: No incident has this letter.

    Example:
        >>> incident("A").title
        'The detector with NaN losses'
    """
    return {i.letter: i for i in INCIDENTS}[letter]
