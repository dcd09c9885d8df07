"""Describes the outcome of a run in words.

Every sentence gives its evidence. If the records do not reveal a cause, the verdict says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastguard.commands.report.causes import likely_cause
from fastguard.commands.report.columns import LR, NORM, Series
from fastguard.commands.report.incidents import Row
from fastguard.commands.report.summary import Summary
from fastguard.commands.report.trend import Rise, find_rise
from fastguard.errors import plural
from fastguard.errors.plain_text import printable

_CLIPPED_OFTEN = 0.5
_LR_GONE = 1e-6  # a smaller fraction of the highest learning rate counts as zero
_LR_GONE_FOR = 0.05  # minimum fraction of the run


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a run; each sentence is one printable line.

    Attributes:
        headline: One sentence.
        findings: Further sentences, the most important first.
        survived: Whether a good step follows the last incident.
    """

    headline: str
    findings: list[str]
    survived: bool


def judge(summary: Summary) -> Verdict:
    """Judges a run."""
    if not summary.records:
        headline = "No record was found."
        return Verdict(headline, list(_reading(summary)), survived=True)
    rises = {
        series: rise
        for series in [NORM, *_losses(summary)]
        if (rise := _rise(summary, series)) is not None
    }
    cause = likely_cause(summary, norm_rises=NORM in rises)
    findings = [*_ending(summary), *([cause] if cause else []), *_rises(rises)]
    findings += [*_clipping(summary), *_loss_scale(summary)]
    findings += [*_learning_rate(summary), *summary.watched.findings(), *_jumps(summary)]
    return Verdict(_headline(summary), [*findings, *_reading(summary)], summary.survived)


def _headline(summary: Summary) -> str:
    steps = plural(summary.records, "step")
    n = summary.table.incidents
    if not n:
        return f"No incident in {steps}."
    incidents = f"{plural(n, 'incident')} in {steps}"
    if summary.watched.drifting:
        return f"{incidents}; the replicas differed when they were last compared."
    if not summary.survived:
        return f"{incidents}; the last one was not over when the records ended."
    return f"{incidents}, {'survived' if n == 1 else 'all survived'}."


def _ending(summary: Summary) -> Iterator[str]:
    last = summary.table.last
    if not summary.ends_in_incident or last is None:
        return
    if last.steps == 1:
        yield f"The last step, {last.first_step:,}, was bad ({_reasons(last)})."
        return
    applied = last.steps - last.actions["skipped"]
    since = (
        f"No step since {last.first.step:,} was good ({plural(last.steps, 'step')}, "
        f"{_reasons(last)})"
    )
    if not applied:
        yield (
            f"{since}, and all of these steps were skipped: weights and optimizer state are the "
            f"same as before step {last.first.step:,}. If the batches are fine, the weights were "
            "already bad; check a checkpoint with `fastguard ckpt verify`."
        )
        return
    yield (
        f"{since}, and {applied:,} of them reached the weights: weights or optimizer state may no "
        f"longer be usable. Go back to a checkpoint from before step {last.first.step:,}."
    )


def _reasons(row: Row) -> str:
    return ", ".join(
        f"{reason} {n:,}×" if len(row.reasons) > 1 else reason
        for reason, n in row.reasons.most_common()
    )


def _losses(summary: Summary) -> list[Series]:
    """The losses that can rise; signals of `check_batch` are only 0 or 1."""
    return [
        series
        for series in summary.curves
        if series.kind == "loss" and not series.name.startswith("batch.")
    ]


def _rise(summary: Summary, series: Series) -> Rise | None:
    curve = summary.curves.get(series)
    if curve is None:
        return None
    return find_rise(curve.middle, curve.mean, factor=1.5 if series == NORM else 1.1)


def _rises(rises: dict[Series, Rise]) -> Iterator[str]:
    for series, rise in rises.items():
        what = "Gradient norm" if series == NORM else f"Loss “{printable(series.name, 80)}”"
        yield (
            f"{what} has been rising since about step {rise.since:,}: from {rise.before:.3g} to "
            f"{rise.now:.3g}."
        )


def _clipping(summary: Summary) -> Iterator[str]:
    share = summary.actions["clipped"] / summary.records
    if share >= _CLIPPED_OFTEN:
        yield (
            f"{share:.0%} of the steps were clipped: max_norm is below the usual norm, so it "
            "sets the length of nearly every step."
        )


def _loss_scale(summary: Summary) -> Iterator[str]:
    n = summary.scale_searches
    if n:
        yield (
            f"{plural(n, 'step')} {'was' if n == 1 else 'were'} skipped only to lower the loss "
            "scale, as a GradScaler does in every fp16 run. These are not incidents."
        )


def _learning_rate(summary: Summary) -> Iterator[str]:
    curve = summary.curves.get(LR)
    if curve is None:
        return
    if curve.high.max() <= 0:
        yield "The learning rate is 0 at every step: nothing is learned."
        return
    gone = curve.high <= _LR_GONE * curve.high.max()
    since = len(gone) - int(np.argmin(gone[::-1])) if not gone.all() else 0
    if since < len(gone) and len(gone) - since > _LR_GONE_FOR * len(gone):
        yield (
            f"The learning rate has been almost zero ({curve.high[-1]:.3g}) since about step "
            f"{int(curve.middle[since]):,}: nothing is learned any more."
        )


def _jumps(summary: Summary) -> Iterator[str]:
    if not summary.n_jumps:
        return
    first = summary.jumps[0]
    often = "once," if summary.n_jumps == 1 else f"{summary.n_jumps:,} times, first"
    yield (
        f"The step number went back {often} from {first.from_step:,} to {first.to_step:,}: a "
        "rollback, a resume from a checkpoint, or another run in the same file."
    )


def _reading(summary: Summary) -> Iterator[str]:
    if summary.damaged:
        yield (
            f"{plural(summary.damaged, 'line')} could not be read and "
            f"{'was' if summary.damaged == 1 else 'were'} left out."
        )
