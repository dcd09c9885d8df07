"""Why the incidents of a run may have happened, from what they have in common.

Each candidate says for how many incidents it accounts; the first that accounts for at least half
is named, and if none does the report says that no cause stands out. Most specific first: a batch
that comes back, a part of the loss, a layer; then the stage in which the first non-finite value was
seen; then what finite spikes point to.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastguard.commands.report.columns import LR
from fastguard.commands.report.summary import Summary

_MOST_OF = 0.5
_FIND = "fastguard.explain_nonfinite names the operation."


def likely_cause(summary: Summary, *, norm_rises: bool) -> str | None:
    """One sentence or two: a cause, what it rests on and a remedy; None without an incident.

    Args:
        summary: The run.
        norm_rises: Whether the gradient norm is rising at its end.
    """
    total = summary.table.incidents
    if not total:
        return None
    for n, cause in _candidates(summary, norm_rises):
        if n == total or (n > 1 and n >= _MOST_OF * total):
            share = "" if total == 1 else f" ({n:,} of {total:,} incidents)"
            return f"Likely cause{share}: {cause}"
    return "No cause stands out: the incidents have too little in common."


def _candidates(summary: Summary, norm_rises: bool) -> Iterator[tuple[int, str]]:
    """`(incidents that it accounts for, cause and remedy)`."""
    evidence, kinds = summary.evidence, summary.evidence.kinds
    for tags, what in ((evidence.tags, "tag"), (evidence.batches, "batch")):
        for tag, n in tags.most_common(1):
            if n > 1:
                text = f"the data: {what} {tag} was there each time. Look at it or leave it out."
                yield n, text
    for name, n in evidence.lone_losses.most_common(1):
        text = (
            f"the loss part “{name}”, non-finite while the others were finite. Look in it for a "
            f"division by zero, a logarithm or a root of zero; {_FIND}"
        )
        yield n, text
    text = (
        "the forward pass: the loss itself was not finite. Bad input or an overflow: "
        "fastguard.check_batch and fastguard.explain_nonfinite tell which."
    )
    yield kinds["loss"], text
    for layer, n in evidence.layers.most_common(1):
        text = f"the backward pass of {layer}: its gradients alone were not finite. {_FIND}"
        yield n, text
    text = (
        "an overflow: infinite gradients without a NaN, from a finite loss, which no lower loss "
        "scale has cured. If the model runs in fp16 its values outgrow it, and bf16 is the remedy."
    )
    yield kinds["overflow"], text
    text = f"the backward pass: NaN in the gradients of a finite loss. {_FIND}"
    yield kinds["backward"], text
    yield from _spikes(summary, norm_rises)


def _spikes(summary: Summary, norm_rises: bool) -> Iterator[tuple[int, str]]:
    n = summary.evidence.kinds["grad_spike"] + summary.evidence.kinds["loss_spike"]
    if norm_rises:
        text = "a learning rate that is too high: spikes, and a gradient norm that keeps rising."
        yield n, text
    lr = summary.curves.get(LR)
    if lr is not None and lr.high.max() > lr.low.min():
        peak = int(lr.high_at[np.argmax(lr.high)])
        early = sum(row.incidents for row in summary.table.rows if row.last_step < peak)
        if peak < (summary.first_step + summary.last_step) / 2:
            text = (
                "a warm-up that is too short or goes too high: spikes before the learning rate had "
                f"its highest value, at step {peak:,}."
            )
            yield min(n, early), text
    text = (
        "single batches that do not fit the rest: finite spikes, and no lasting rise of the "
        "gradient norm. The tags in the table lead to them."
    )
    yield n, text
