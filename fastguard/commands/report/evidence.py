"""Counts what the incidents of a run have in common, as evidence for a cause.

Each incident counts once, by its first step, since later steps are often consequences.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastguard.commands.report.columns import BadStep
from fastguard.errors.plain_text import printable
from fastguard.records.layers import layer_of

_MAX_NAMES = 10_000
"""Maximum number of distinct tags, layers or losses counted."""


class Evidence:
    """Counts over the incidents of a run.

    Attributes:
        kinds: Incidents by `kind_of`.
        lone_losses: Incidents in which exactly one of several losses was non-finite, by loss.
        layers: Incidents with non-finite gradients in a single layer, by layer.
        tags: Incidents by tag.
        batches: Incidents by the batch part of a compound tag, such as `(epoch, batch)` or
            `{"epoch": 3, "batch": 46}`.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.lone_losses: Counter[str] = Counter()
        self.layers: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()

    def add(self, bad: BadStep) -> None:
        """Counts an incident, given its first step."""
        self.kinds[kind_of(bad)] += 1
        if len(bad.bad_losses) == 1 and bad.n_losses > 1:
            _count(self.lone_losses, bad.bad_losses[0])
        layers = {layer_of(culprit[0]) for culprit in bad.culprits}
        if len(layers) == 1 and bad.n_culprits == len(bad.culprits) and not bad.bad_losses:
            _count(self.layers, layers.pop())
        if bad.tag is not None:
            _count(self.tags, tag_text(bad.tag))
            batch = _batch_of(bad.tag)
            if batch is not None:
                _count(self.batches, tag_text(batch))


def kind_of(bad: BadStep) -> str:
    """The kind of the first fault, as far as the record shows.

    Returns:
        `"loss"` if a loss was non-finite; `"backward"` if the losses were finite and a gradient was
        NaN; `"overflow"` if the losses were finite and gradients were only infinite, or only a
        GradScaler found the overflow. Otherwise, the reason in the record.
    """
    if bad.bad_losses:
        return "loss"
    if bad.reason == "nonfinite_grad":
        return "backward" if any(nan for _, nan, _, _ in bad.culprits) else "overflow"
    return bad.reason


def tag_text(tag: Any) -> str:
    """Formats a shortened tag as one short printable line.

    Example:
        >>> tag_text({"epoch": 3, "batch": 46}), tag_text([3, 46])
        ('epoch 3, batch 46', '3, 46')
    """
    if isinstance(tag, dict):
        tag = [f"{key} {value}" for key, value in tag.items()]
    text = ", ".join(map(str, tag)) if isinstance(tag, list) else str(tag)
    return printable(" ".join(text.split()), limit=80)


def _batch_of(tag: Any) -> Any:
    """The part of a tag that can recur in another epoch, or None."""
    if isinstance(tag, dict):
        return tag.get("batch") if len(tag) > 1 else None
    return tag[-1] if isinstance(tag, list) and len(tag) > 1 else None


def _count(counter: Counter[str], name: str) -> None:
    if name in counter or len(counter) < _MAX_NAMES:
        counter[name] += 1
