"""Detects whether a sample's output depends on the other samples in its batch.

A softmax over axis 0, or a recurrent or attention layer that treats its input as (time, batch), is
suspected because of its arguments and then tested: in evaluation mode, one sample is replaced with
a copy of another sample, and the outputs of all other samples must not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding
from fastguard.diagnosis.observe import observe
from fastguard.diagnosis.replay.calls import floats
from fastguard.diagnosis.replay.replay import copied
from fastguard.diagnosis.replay.subject import split, tensors
from fastguard.errors import several

CHECK = Family("forward")

CHANGED = 1e-3  # relative to the largest output; rounding errors are a thousand times smaller
_TIME_FIRST = (nn.RNNBase, nn.MultiheadAttention)


def check_mixing(evidence: Evidence) -> Iterator[Finding]:
    """Runs the experiment only if a module is suspected and the batch axis is known."""
    n = _samples(evidence)
    if n < 2 or evidence.step.failures or not evidence.is_finite:
        return
    suspects = [where for where, size in evidence.step.functions.over_first_axis if size == n]
    called = set(evidence.step.called)
    layers = [
        name
        for module, name in evidence.subject.modules.items()
        if isinstance(module, _TIME_FIRST) and not module.batch_first and name in called
    ]
    if not (suspects or layers) or not _mixes(evidence, n):
        return
    what = "a softmax over axis 0, in " if suspects else "batch_first=False of "
    where = list(dict.fromkeys(suspects or layers))
    yield CHECK.error(
        "wrong-axis",
        f"the output of a sample depends on other samples of the batch, because of {what}"
        f"{several(where)}: axis 0 is the batch of {n} samples",
        where=where[0],
        value=n,
        remedy="take the softmax over dim=-1 or dim=1; without dim=, softmax uses axis 0 of a "
        "tensor with 1 or 3 dimensions."
        if suspects
        else "create the layer with batch_first=True, or pass input.transpose(0, 1) to the layer.",
    )


def _samples(evidence: Evidence) -> int:
    """Returns the number of samples if axis 0 is certainly the batch axis; otherwise 0."""
    inputs, targets = split(evidence.subject.batch)
    first, second = tensors(inputs), tensors(targets)
    sizes = {t.shape[0] if t.ndim else 0 for t in (*first, *second)}
    if len(sizes) != 1 or not second:
        return 0
    n = sizes.pop()
    # A sequence may have the axes (time, batch). If there is one target per sample, or if the
    # samples are rows or images, axis 0 is the batch.
    plain = all(t.numel() == n for t in second) or all(
        t.ndim == 4 or (t.ndim == 2 and t.is_floating_point()) for t in first
    )
    return n if plain else 0


@torch.no_grad()
def _mixes(evidence: Evidence, n: int) -> bool:
    def replace_first(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim and x.shape[0] == n:
            x = x.clone()
            x[0] = x[1]
        return x

    subject = evidence.subject
    changed = tree_map(replace_first, copied(subject.batch))

    def outputs(batch: Any) -> list[Tensor]:
        subject.model.eval()
        return floats(observe(subject, batch, backward=False).output)

    before = evidence.isolated(lambda: outputs(subject.batch))
    after = evidence.isolated(lambda: outputs(changed))
    for a, b in zip(before, after, strict=False):
        if a.shape != b.shape or not a.ndim or a.shape[0] != n:
            continue
        if float((a - b)[1:].abs().max()) > CHANGED * float(a.abs().max()):
            return True
    return False
