"""Text available on every machine: the source of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastguard.commands.usage import UsageError

CAP = 1_500_000
"""Maximum number of bytes to read, which is more than a one-minute run uses."""
MIN_CHARACTERS = 10_000
"""Minimum number of training bytes, and of held-out bytes."""


@dataclass(frozen=True, slots=True)
class Text:
    """Training bytes and held-out bytes.

    Attributes:
        training: int64 `(n,)`, values 0 to 255.
        validation: int64 `(m,)`: every tenth file.
    """

    training: Tensor
    validation: Tensor

    def batches(self, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields random `(inputs, targets)`, int64 `(size, context)` each, forever; seeded."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(context + 1)
        while True:
            starts = torch.randint(len(self.training) - context, (size, 1), generator=generator)
            drawn = self.training[starts + window]
            yield drawn[:, :-1], drawn[:, 1:]

    def held_out(self, size: int, context: int) -> tuple[Tensor, Tensor]:
        """`(inputs, targets)` of `size` windows spread evenly over the validation bytes."""
        starts = torch.linspace(0, len(self.validation) - context - 1, size).long()[:, None]
        drawn = self.validation[starts + torch.arange(context + 1)]
        return drawn[:, :-1], drawn[:, 1:]


def load_text(folder: Path | None = None, cap: int = CAP) -> Text:
    """Loads the public top-level modules of the standard library in alphabetical order.

    Private modules are left out: some are generated when Python is built and differ by machine.

    Args:
        folder: Folder with `.py` files. Default: the standard library of this Python.
        cap: Stop after this many bytes.

    Raises:
        UsageError: There is too little source code (some Python installations have only compiled
            files).
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for i, path in enumerate(sorted(folder.glob("[a-z]*.py"))):
        source = path.read_bytes()[: cap - total]
        parts[i % 10 == 9].append(source)
        total += len(source)
        if total >= cap:
            break
    training, validation = (b"".join(parts[held_out]) for held_out in (False, True))
    if min(len(training), len(validation)) < MIN_CHARACTERS:
        raise UsageError(
            f"{folder} holds {total} bytes of Python source, too little to train on; "
            "use a Python that ships its standard library as .py files"
        )
    return Text(_as_tensor(training), _as_tensor(validation))


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
