"""Infers the likely cause of a run's incidents from what they have in common.

For each candidate cause, the incidents that it explains are counted. The first candidate that
explains at least half of the incidents is reported; if there is none, the report says so. The
candidates, from most to least
specific: a recurring batch, a part of the loss, a layer, the pass (forward or backward) in which
the first non-finite value appeared, then the causes of finite spikes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastguard.commands.report.columns import LR
from fastguard.commands.report.summary import Summary
from fastguard.records.step_record import REPLICA_DRIFT

_MIN_SHARE = 0.5
_FIND = "fastguard.explain_nonfinite names the operation."


def likely_cause(summary: Summary, *, norm_rises: bool) -> str | None:
    """Returns the likely cause with its evidence and a remedy, or None without an incident.

    Args:
        summary: The run.
        norm_rises: Whether the gradient norm is rising at the end of the run.
    """
    total = summary.table.incidents
    if not total:
        return None
    for n, cause in _candidates(summary, norm_rises):
        if n == total or (n > 1 and n >= _MIN_SHARE * total):
            share = "" if total == 1 else f" ({n:,} of {total:,} incidents)"
            return f"Likely cause{share}: {cause}"
    return "No cause stands out: the incidents have too little in common."


def _candidates(summary: Summary, norm_rises: bool) -> Iterator[tuple[int, str]]:
    """Yields `(number of incidents explained, cause and remedy)`."""
    evidence, kinds = summary.evidence, summary.evidence.kinds
    for tags, what in ((evidence.tags, "tag"), (evidence.batches, "batch")):
        for tag, n in tags.most_common(1):
            if n > 1:
                text = (
                    f"the data: {what} {tag} was used each time. Inspect this data, or exclude it."
                )
                yield n, text
    for name, n in evidence.lone_losses.most_common(1):
        text = (
            f"the loss part “{name}”, which was non-finite while all other parts were finite. "
            f"Check this part for a division by zero, or a logarithm or root of zero; {_FIND}"
        )
        yield n, text
    text = (
        "the forward pass: the loss itself was not finite. Use fastguard.check_batch and "
        "fastguard.explain_nonfinite to find out whether bad input or an overflow is the reason."
    )
    yield kinds["loss"], text
    for layer, n in evidence.layers.most_common(1):
        text = f"the backward pass of {layer}: its gradients alone were not finite. {_FIND}"
        yield n, text
    text = (
        "an overflow: gradients were infinite but not NaN although the loss was finite, and "
        "lowering the loss scale did not help. If the model runs in fp16, its values exceed the "
        "range of fp16; use bf16."
    )
    yield kinds["overflow"], text
    text = f"the backward pass: gradients contained NaN although the loss was finite. {_FIND}"
    yield kinds["backward"], text
    text = (
        "replicas that must be equal differ, because of a flipped bit, a missing broadcast of the "
        "weights, or different random seeds."
    )
    yield kinds[REPLICA_DRIFT], text
    yield from _spikes(summary, norm_rises)


def _spikes(summary: Summary, norm_rises: bool) -> Iterator[tuple[int, str]]:
    n = summary.evidence.kinds["grad_spike"] + summary.evidence.kinds["loss_spike"]
    if norm_rises:
        text = "a learning rate that is too high: there are spikes, and the gradient norm rises."
        yield n, text
    lr = summary.curves.get(LR)
    if lr is not None and lr.high.max() > lr.low.min():
        peak = int(lr.high_at[np.argmax(lr.high)])
        early = sum(row.incidents for row in summary.table.rows if row.last_step < peak)
        if peak < (summary.first_step + summary.last_step) / 2:
            text = (
                "a warm-up that is too short or peaks too high: there were spikes before the "
                f"learning rate peaked at step {peak:,}."
            )
            yield min(n, early), text
    text = (
        "unusual single batches: there were finite spikes, but the gradient norm did not keep "
        "rising. The tags in the table identify these batches."
    )
    yield n, text
