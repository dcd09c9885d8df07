"""Finds samples that CTC loss cannot align because their targets are longer than their inputs.

A target of n labels needs n time steps, plus one for the blank between two equal neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

REMEDY = (
    "drop such samples from the data, or keep more time steps by using less striding and pooling. "
    "Check that input_lengths counts the model's output steps, not its input samples."
)


class Unaligned(NamedTuple):
    """A sample that cannot be aligned.

    Attributes:
        sample: The index of the sample in the batch.
        steps: Number of time steps.
        labels: Number of labels.
        repeats: Number of labels that are equal to the previous label.
    """

    sample: int
    steps: int
    labels: int
    repeats: int

    def __str__(self) -> str:
        blanks = f" and {self.repeats} blanks between equal neighbors" if self.repeats else ""
        return f"sample {self.sample} has {self.labels} labels{blanks} for {self.steps} time steps"


def unaligned(targets: Tensor, input_lengths: Any, target_lengths: Any) -> Iterator[Unaligned]:
    """Yields the samples that cannot be aligned; synchronizes with the GPU.

    Args:
        targets: Padded, of shape `(N, S)`, or concatenated, of shape `(sum(target_lengths),)`.
        input_lengths, target_lengths: Per sample: a tensor, a sequence, or an integer.
    """
    inputs, lengths = lengths_of(input_lengths), lengths_of(target_lengths)
    start = 0
    for i, (steps, n) in enumerate(zip(inputs, lengths, strict=False)):
        own = targets[i : i + 1, :n].flatten() if targets.ndim == 2 else targets[start : start + n]
        start += n
        repeats = int((own[1:] == own[:-1]).sum())
        if n + repeats > steps:
            yield Unaligned(i, steps, n, repeats)


def lengths_of(given: Any) -> list[int]:
    """Returns lengths per sample as integers, from any form that `F.ctc_loss` accepts."""
    if isinstance(given, Tensor):
        return given.flatten().tolist()
    return [given] if isinstance(given, int) else list(given)
