"""Training runs that went wrong, small enough to watch: `fastguard demo --incident A`.

Each is a module with one function, `run(folder, guarded) -> Outcome`: the same weights, data and
faults, once as it was and once guarded. What is here is meant to be read, and copied from.
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
    """What became of one run.

    Attributes:
        survived: Whether everything that the run leaves behind is finite and of use.
        ended: How it ended, in one sentence.
        losses: The loss of each batch in order, as the run itself saw it.
        records: One for each step of a guarded run, oldest first.
        facts: What else the scenario looked at, by name.
    """

    survived: bool
    ended: str
    losses: Sequence[float]
    records: Sequence[StepRecord] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Incident:
    """One story.

    Attributes:
        letter: What the user types.
        title: The story in a line.
        module: Where its `run` lives; imported when it is played.
        packages: What it needs beside torch.
        extra: The extra that brings them.
    """

    letter: str
    title: str
    module: str
    packages: tuple[str, ...] = ()
    extra: str = "cli"

    def load(self) -> ModuleType:
        """The module that plays it."""
        return importlib.import_module(self.module)

    def run(self, folder: Path, guarded: bool) -> Outcome:
        """Plays it on a CPU: data is generated, nothing is downloaded.

        Args:
            folder: Everything is written below it; must be empty.
            guarded: With fastguard, or as it was.
        """
        return self.load().run(folder, guarded)


INCIDENTS = (
    Incident(
        "A",
        "The detector that met NaN in epoch 3",
        "fastguard.commands.demo.incidents.detector",
        ("ultralytics",),
        "ultralytics",
    ),
    Incident(
        "B",
        "The checkpoint that could not be trusted",
        "fastguard.commands.demo.incidents.classifier",
    ),
    Incident(
        "C",
        "The segmentation model with too many heads",
        "fastguard.commands.demo.incidents.segmentation",
    ),
    Incident(
        "D", "The model that could not learn", "fastguard.commands.demo.incidents.adaptive_stream"
    ),
    Incident(
        "E",
        "The averages that turned NaN",
        "fastguard.commands.demo.incidents.latent_codes",
        ("tensorboard",),
        "tensorboard",
    ),
)


def incident(letter: str) -> Incident:
    """The incident of a letter.

    Raises:
        KeyError: There is none.

    Example:
        >>> incident("A").title
        'The detector that met NaN in epoch 3'
    """
    return {i.letter: i for i in INCIDENTS}[letter]
