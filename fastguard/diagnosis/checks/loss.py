"""The loss: is there one, a scalar, finite, of parts that count alike, a mean and not a sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Finding
from fastguard.diagnosis.replay.replay import loss_parts
from fastguard.diagnosis.replay.subject import tensors
from fastguard.diagnosis.shapes import raised_by_shapes
from fastguard.diagnosis.watch_functions import IndexOutOfRange

CHECK = "loss"

LARGE = 1e4
PARTS = 1e3  # beyond it the smaller part moves nothing


def check(evidence: Evidence) -> Iterator[Finding]:
    """Looks at what the step returned, and at the loss of halves of the batch."""
    yield from _failure(evidence)
    step = evidence.step
    if step.failures and not step.parts:
        yield Finding(
            CHECK,
            "not-checked",
            "note",
            "there is no loss, because what comes before it fails; the backward pass began at the "
            "output, as far as there is one",
        )
        return
    yield from _kind(evidence)
    yield from _values(evidence)
    yield from _sum_over_samples(evidence)


def _failure(evidence: Evidence) -> Iterator[Finding]:
    failure = evidence.step.failed("loss")
    if failure is None or isinstance(failure.error, IndexOutOfRange):  # the data check tells it
        return
    if raised_by_shapes(evidence.step, evidence.subject.targets):  # the forward check tells it
        return
    function = f" in {failure.function}" if failure.function else ""
    yield Finding(
        CHECK,
        "loss-raises",
        "error",
        f"the loss raises {failure}{function}; what follows was found without it",
        where=failure.where,
        remedy="call the loss by itself on this output and these targets to see the whole "
        "traceback.",
    )


def _kind(evidence: Evidence) -> Iterator[Finding]:
    step, subject = evidence.step, evidence.subject
    if step.parts:
        if step.gradients is None and not step.failed("backward"):
            yield Finding(
                CHECK,
                "loss-detached",
                "error",
                "the loss does not depend on any parameter that requires a gradient",
                remedy="look for .detach(), .item(), .data, torch.no_grad(), argmax or rounding "
                "between the parameters and the loss, and for requires_grad=False.",
            )
        return
    if subject.loss_fn is None and subject.given_step is None:
        yield Finding(
            CHECK,
            "not-checked",
            "note",
            "there is no loss: no loss_fn or step is given, and the output carries none; the "
            "backward pass begins at the mean of the output",
            remedy="give loss_fn= or step=.",
        )
        return
    result = step.result
    what = (
        f"a tensor of shape {list(result.shape)}"
        if isinstance(result, Tensor)
        else f"a {type(result).__name__}"
    )
    yield Finding(
        CHECK,
        "loss-shape",
        "error",
        f"the loss is {what}, not one number or a dict of them",
        value=result.numel() if isinstance(result, Tensor) else 0,
        limit=1,
        remedy='reduce it, with .mean() or reduction="mean".',
    )


def _values(evidence: Evidence) -> Iterator[Finding]:
    parts = evidence.step.parts
    bad = {name: value for name, value in parts.items() if not math.isfinite(value)}
    if bad:
        report = evidence.explained
        earlier = report is not None and any(a.values.nonfinite for a in evidence.step.activations)
        born = f"{report.operation}, {report.evidence}" if report is not None else ""
        told = ", ".join(f"{name} is {value}" for name, value in bad.items())
        yield Finding(
            CHECK,
            "nonfinite-loss",
            "error",
            told + ("; it follows from the activations" if earlier else f"; born in {born}"),
            where=", ".join(bad) if len(parts) > 1 else "",
            value=len(bad),
            limit=0,
            remedy="repair what comes first: see the first non-finite activation."
            if earlier
            else (report.remedy if report is not None else "look at its largest inputs."),
        )
    sizes = {n: abs(v) for n, v in parts.items() if math.isfinite(v)}
    name, largest = max(sizes.items(), key=lambda item: item[1], default=("", 0.0))
    if largest > LARGE:
        yield Finding(
            CHECK,
            "large-loss",
            "warning",
            f"{name} is {largest:.3g}",
            where=name if len(parts) > 1 else "",
            value=largest,
            limit=LARGE,
            remedy="average over elements in place of summing, normalise the targets, and weight "
            "this part down.",
        )
    small, smallest = min(((n, v) for n, v in sizes.items() if v), key=_second, default=("", 0.0))
    if smallest and largest / smallest > PARTS:
        yield Finding(
            CHECK,
            "loss-parts",
            "warning",
            f"{name} is {largest:.3g}, {small} only {smallest:.3g}: {largest / smallest:.3g} times "
            "smaller, so it moves next to nothing",
            where=small,
            value=largest / smallest,
            limit=PARTS,
            remedy="weight the parts so that they start within a factor of ten of each other.",
        )


def _second(item: tuple[str, float]) -> float:
    return item[1]


@torch.no_grad()
def _sum_over_samples(evidence: Evidence) -> Iterator[Finding]:
    """A mean over samples is the mean of those of two halves; a sum is their sum."""
    loss_fn, output, targets = evidence.subject.loss_fn, evidence.step.output, None
    targets = evidence.subject.targets
    lengths = {t.shape[0] if t.ndim else 0 for t in tensors((output, targets))}
    if loss_fn is None or targets is None or len(lengths) != 1 or not evidence.step.parts:
        return
    n = lengths.pop()
    if n < 2:
        return
    half = n // 2
    try:
        first = _total(loss_fn(_part(output, 0, half), _part(targets, 0, half)))
        second = _total(loss_fn(_part(output, half, 2 * half), _part(targets, half, 2 * half)))
        whole = _total(loss_fn(_part(output, 0, 2 * half), _part(targets, 0, 2 * half)))
    except Exception:  # a loss that wants whole batches: then this is not known
        return
    if not math.isfinite(whole) or first <= 0 or second <= 0:
        return
    if abs(whole / (first + second) - 1) < 1e-3:
        yield Finding(
            CHECK,
            "sum-reduction",
            "warning",
            f"the loss of {2 * half} samples, {whole:.4g}, is the sum of those of its halves: "
            "gradients grow with the batch, and the learning rate fits one batch size alone",
            value=2 * half,
            limit=1,
            remedy='use reduction="mean", or divide the sum by the number of samples or elements.',
        )


def _part(tree: Any, start: int, end: int) -> Any:
    return tree_map(lambda x: x[start:end] if isinstance(x, Tensor) else x, tree)


def _total(result: Any) -> float:
    return sum(float(part) for part in loss_parts(result).values())
