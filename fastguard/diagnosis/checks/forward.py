"""Checks the forward pass: whether it runs, has the shape of its targets, and stays in range."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.checks.mixing import check_mixing
from fastguard.diagnosis.checks.own_loss import hint_for
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, percent
from fastguard.diagnosis.observe import Activation
from fastguard.diagnosis.provenance import NonFiniteReport
from fastguard.diagnosis.shapes import misfits
from fastguard.diagnosis.watch_functions import (
    Saturation,
    ShapeMismatch,
)
from fastguard.errors import several

CHECK = Family("forward")

LARGE = 1e4  # float16 ends at 65504, and norms and losses square their inputs
HOPELESS = 1e12  # squares of such values, when summed, may exceed float32's limit of 3.4e38
DEAD_RELU = 0.99
SATURATED = 0.9
ONE_HOT_SOFTMAX = 0.99

_FIT = (
    "give the output and the targets the same size: add the missing upsampling steps to the "
    "decoder, use torch.nn.functional.interpolate(output, size=target.shape[-2:]), or resize the "
    "targets."
)

_LEFT_OUT = (
    "later checks are skipped; run the model on this batch by itself to see the whole traceback."
)
_ONE_VALUE = (
    "a single value has no variance, so this normalization is undefined in training: drop a last "
    "batch of one sample (DataLoader(drop_last=True)), give this layer more than one position, use "
    "GroupNorm or LayerNorm, or call model.eval() to use the running statistics."
)


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks the forward pass of one step."""
    yield from _failures(evidence)
    yield from _shapes(evidence)
    yield from _nonfinite(evidence)
    yield from check_mixing(evidence)
    yield from _extreme(evidence)
    yield from _saturated(evidence.step.functions.saturations)
    if not evidence.subject.model.training:
        yield CHECK.note(
            "eval-mode",
            "the model is in evaluation mode: dropout is off, and batch norms use their running "
            "statistics",
            remedy="call model.train() first to diagnose training.",
        )


# Whether the forward pass runs.


def _failures(evidence: Evidence) -> Iterator[Finding]:
    failure = evidence.step.failed("forward")
    if failure is None or failure.has_own_finding:
        return
    yield CHECK.error(
        "forward-raises",
        f"the model raises {failure}",
        where=failure.where,
        remedy=_remedy_of(evidence, str(failure.error)),
    )


def _remedy_of(evidence: Evidence, message: str) -> str:
    if "more than 1 value per channel" in message or "more than 1 spatial element" in message:
        return _ONE_VALUE
    hint = hint_for(evidence) if "argument" in message or "target" in message.lower() else ""
    return "; ".join(filter(None, [hint, _LEFT_OUT]))


# Whether the output has the shape of its targets.


def _shapes(evidence: Evidence) -> Iterator[Finding]:
    step, targets = evidence.step, evidence.subject.targets
    places = {
        (tuple(a.shape), tuple(b.shape)): where for where, a, b in misfits(step.output, targets)
    }
    for mismatch in step.functions.shape_mismatches:
        yield _shape_mismatch(mismatch, places.get((mismatch.output, mismatch.target), ""))
    if step.functions.shape_mismatches:  # `_broadcasts` reports these
        return
    failed = step.failed("loss")
    for where, output, target in misfits(step.output, targets):
        larger, smaller = sorted((output.numel(), target.numel()), reverse=True)
        yield Finding(
            CHECK,
            "resized-output" if failed is None else "shape-mismatch",
            "note" if failed is None else "error",
            f"the output is {list(output.shape)}, its target {list(target.shape)}; the loss "
            + ("accepts this" if failed is None else f"raises {failed}"),
            where=where,
            value=larger / max(smaller, 1),
            limit=1,
            remedy="" if failed is None else _FIT,
        )


def _shape_mismatch(mismatch: ShapeMismatch, where: str) -> Finding:
    shapes = f"output {list(mismatch.output)} and target {list(mismatch.target)}"
    smaller, larger = sorted((math.prod(mismatch.output), math.prod(mismatch.target)))
    if mismatch.result is None:
        return CHECK.error(
            "shape-mismatch",
            f"{mismatch.function} cannot compare {shapes}",
            where=where,
            value=larger / smaller,
            limit=1,
            remedy=_FIT,
        )
    all_pairs = ", so it compares every output with all targets" if mismatch.both_ways else ""
    return Finding(
        CHECK,
        "silent-broadcast",
        "error" if mismatch.both_ways else "warning",
        f"{mismatch.function} silently expands {shapes} to {list(mismatch.result)}{all_pairs}",
        where=where,
        value=math.prod(mismatch.result) / larger,
        limit=1,
        remedy="give both the same shape before the loss, with output.squeeze(1) or "
        "target.unsqueeze(1).",
    )


# Whether values stay finite.


def _nonfinite(evidence: Evidence) -> Iterator[Finding]:
    bad = [a for a in evidence.step.activations if a.values.nonfinite]
    if not bad:
        return
    report = evidence.explained
    failed = bool(evidence.step.failures)
    if report is None and not failed:
        yield Finding(
            CHECK,
            "ignored-nonfinite",
            "warning" if any(a.values.nan for a in bad) else "note",
            f"{several(_names(bad))} output NaN or Inf, but these values reach neither the loss "
            "nor the gradients",
            where=bad[0].where,
            value=bad[0].values.nonfinite / bad[0].values.numel,
            limit=0,
            remedy="this is fine for a mask of -Inf. A NaN that is only masked out, however, "
            "reappears in the backward pass as 0 * NaN.",
        )
        return
    if evidence.repaired is not evidence:  # the model itself may produce NaN or Inf too
        yield from _nonfinite(evidence.repaired)
    yield _first_nonfinite(evidence, bad, report)


def _first_nonfinite(
    evidence: Evidence, bad: list[Activation], report: NonFiniteReport | None
) -> Finding:
    first = bad[0]
    share = first.values.nonfinite / first.values.numel
    n = len({a.where for a in evidence.step.activations})
    seen = [
        f"{percent(share)} of the output of {first.where} is NaN or Inf; "
        f"{len(set(_names(bad)))} of {n} modules are affected, this one first"
    ]
    remedy = "call fastguard.explain_nonfinite on this batch to find the operation."
    if report is not None:
        remedy = report.remedy
        if report.origin == "forward":
            seen.append(f"the first NaN or Inf appeared in {report.operation}")
        elif report.origin is not None:
            seen.append(f"the {report.origin} value {report.tensor} was already non-finite")
        if report.origin == "batch":
            seen.append("the check of the backward pass and all later checks used 0 instead")
        seen += [text for text in (report.evidence, report.source) if text]
    return CHECK.error(
        "nonfinite-activation",
        "; ".join(seen),
        where=(report.module if report is not None else "") or first.where,
        value=share,
        limit=0,
        remedy=remedy,
    )


def _names(activations: list[Activation]) -> list[str]:
    return list(dict.fromkeys(a.where for a in activations))


# Whether values stay in range.


def _extreme(evidence: Evidence) -> Iterator[Finding]:
    large = [a for a in evidence.step.activations if a.values.largest > LARGE]
    if not large:
        return
    worst = max(a.values.largest for a in large)
    yield Finding(
        CHECK,
        "extreme-activation",
        "error" if worst > HOPELESS else "warning",
        f"activations reach {large[0].values.largest:.3g} in {large[0].where}, the first of "
        f"{len(set(_names(large)))} such modules, and up to {worst:.3g} overall",
        where=large[0].where,
        value=worst,
        limit=LARGE,
        remedy="put a normalization layer before this layer, lower the gain of its weights, and "
        "normalize the inputs.",
    )


# Whether activations are saturated.


def _saturated(saturations: list[Saturation]) -> Iterator[Finding]:
    limits = {"relu": DEAD_RELU, "softmax": ONE_HOT_SOFTMAX}
    stuck = [s for s in saturations if s.share > limits.get(s.function, SATURATED)]
    for function in dict.fromkeys(s.function for s in stuck):
        found = [s for s in stuck if s.function == function]
        worst = max(found, key=lambda s: s.share)
        what, remedy = _SATURATION[function]
        yield CHECK.warning(
            "saturated",
            f"{percent(worst.share)} {what}; this affects {several([s.where for s in found])}",
            where=worst.where,
            value=worst.share,
            limit=limits.get(function, SATURATED),
            remedy=remedy,
        )


_SATURATION = {
    "relu": (
        "of the ReLU's output is 0 and passes no gradient",
        "lower the learning rate or the bias, put a normalization layer before the ReLU, or use a "
        "leaky ReLU or GELU.",
    ),
    "sigmoid": (
        "of the sigmoid's output is within 3e-4 of 0 or 1 and passes almost no gradient",
        "reduce the scale of the sigmoid's input; in a loss, use binary_cross_entropy_with_logits.",
    ),
    "tanh": (
        "of the tanh's output is within 5e-4 of -1 or 1 and passes almost no gradient",
        "reduce the scale of the tanh's input, or put a normalization layer before it.",
    ),
    "softmax": (
        "of the softmax's rows are one-hot and pass almost no gradient",
        "divide attention scores by the square root of the head size, or normalize queries and "
        "keys. If the softmax is over an axis of length 1, its result is always 1, and the axis is "
        "wrong.",
    ),
}
