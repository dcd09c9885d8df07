"""Checks whether the loss exists, is a finite scalar and a mean, and what its parts contribute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastguard.diagnosis.checks.loss_inputs import check_loss_inputs
from fastguard.diagnosis.checks.own_loss import hint_for, plain_step, returns_its_loss, step_for
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding
from fastguard.diagnosis.observe import Failure
from fastguard.diagnosis.replay.losses import loss_parts, number_in
from fastguard.diagnosis.replay.subject import tensors
from fastguard.diagnosis.shapes import raised_by_shapes
from fastguard.errors import several

CHECK = Family("loss")

LARGE = 1e4
PARTS = 1e3  # largest normal ratio between the gradient norms of two parts


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks what the step returned, and the loss of halves of the batch."""
    yield from _failure(evidence)
    yield from check_loss_inputs(evidence)
    step = evidence.step
    if step.failures and not step.parts:
        yield CHECK.note(
            "not-checked",
            "there is no loss because an earlier stage failed; the backward pass started at the "
            "output, if there is one",
        )
        return
    yield from _kind(evidence)
    yield from _values(evidence)
    yield from _parts(evidence)
    yield from _sum_over_samples(evidence)


def _failure(evidence: Evidence) -> Iterator[Finding]:
    failure = evidence.step.failed("loss")
    if failure is None or failure.has_own_finding:
        return
    # the check of the forward pass reports such an error
    if raised_by_shapes(evidence.step, evidence.subject.targets):
        return
    function = f" in {failure.function}" if failure.function else ""
    yield CHECK.error(
        "loss-raises",
        f"the loss raises {failure}{function}; later checks run without a loss",
        where=failure.where,
        remedy=_remedy_of(evidence, failure),
    )


def _remedy_of(evidence: Evidence, failure: Failure) -> str:
    alone = "call the loss by itself on this output and these targets to see the whole traceback."
    hint = hint_for(evidence)
    return f"{alone} Note that {hint}." if hint and loss_parts(evidence.step.output) else alone


def _kind(evidence: Evidence) -> Iterator[Finding]:
    step, subject = evidence.step, evidence.subject
    if step.parts:
        if evidence.is_detached and not step.failed("backward"):
            held = "the optimizer holds" if subject.optimizer else "requires a gradient"
            yield _detached(
                f"the loss is detached: it does not depend on any parameter that {held}"
            )
        elif returns_its_loss(evidence):
            instead = step_for(evidence) or plain_step(evidence)
            yield CHECK.warning(
                "loss-shape",
                "the model returns one number for all samples, which looks like a loss that the "
                "model computed, but loss_fn compares this number with the targets",
                value=1,
                remedy=f"if this number is the loss, pass {instead} instead of loss_fn.",
            )
        return
    if subject.loss_fn is None and subject.given_step is None and not number_in(step.result):
        yield CHECK.note(
            "not-checked",
            "there is no loss, because no loss_fn or step was given and the output contains no "
            "loss; the backward pass starts at the mean of the output",
            remedy="; ".join(["pass loss_fn= or step=", *filter(None, [hint_for(evidence)])]) + ".",
        )
        return
    result = step.result
    if number := number_in(result):
        yield _detached(
            f"the loss is detached: the step returned {number}, a number without the graph that "
            "the backward pass needs"
        )
        return
    if result is None:
        yield CHECK.error(
            "loss-shape",
            "the step returned None as the loss",
            remedy="end the function with `return loss`.",
        )
        return
    what = (
        f"a tensor of shape {list(result.shape)}"
        if isinstance(result, Tensor)
        else f"a {type(result).__name__}"
    )
    yield CHECK.error(
        "loss-shape",
        f"the loss is {what}; expected a scalar tensor, a dict of scalar tensors, or an object "
        "with a `loss`",
        value=result.numel() if isinstance(result, Tensor) else 0,
        limit=1,
        remedy='reduce the loss to a scalar, with .mean() or reduction="mean".'
        if isinstance(result, Tensor)
        else "return the loss itself, a dict of its parts, or an object with a `loss`.",
    )


def _detached(seen: str) -> Finding:
    return CHECK.error(
        "loss-detached",
        seen,
        remedy="return the loss tensor itself, and use .item() or float() only for logging. "
        "Otherwise look for .detach(), .data, .numpy(), torch.tensor(loss), torch.no_grad(), "
        "argmax or rounding between the parameters and the loss. Also check for "
        "requires_grad=False, and whether the optimizer belongs to another part of the model.",
    )


def _values(evidence: Evidence) -> Iterator[Finding]:
    parts = evidence.step.parts
    bad = {name: value for name, value in parts.items() if not math.isfinite(value)}
    if bad:
        report = evidence.explained
        earlier = report is not None and any(a.values.nonfinite for a in evidence.step.activations)
        origin = ", ".join(filter(None, (report.operation, report.evidence))) if report else ""
        text = ", ".join(f"{name} is {value}" for name, value in bad.items())
        yield CHECK.error(
            "nonfinite-loss",
            text + ("; the cause is in the activations" if earlier else f"; first in {origin}"),
            where=", ".join(bad) if len(parts) > 1 else "",
            value=len(bad),
            limit=0,
            remedy="fix the first non-finite activation."
            if earlier
            else (report.remedy if report is not None else "check its largest inputs."),
        )
    sizes = {n: abs(v) for n, v in parts.items() if math.isfinite(v)}
    name, largest = max(sizes.items(), key=lambda item: item[1], default=("", 0.0))
    if largest > LARGE:
        yield CHECK.warning(
            "large-loss",
            f"{name} is {largest:.3g}",
            where=name if len(parts) > 1 else "",
            value=largest,
            limit=LARGE,
            remedy="average over elements instead of summing, normalize the targets, and give this "
            "part of the loss a smaller weight.",
        )


def _parts(evidence: Evidence) -> Iterator[Finding]:
    """Compares the gradients of the parts, each over the parameters that the part affects."""
    if len(evidence.step.parts) < 2 or evidence.no_steps_reason:
        return
    found = evidence.part_gradients
    for name, own in found.items():
        if not own:
            continue
        norm, rest = _own_and_rest(found, name)
        if rest / norm > PARTS and _is_small_nearby(evidence, name):
            yield CHECK.warning(
                "loss-parts",
                f"the gradient norm of {name} is {norm:.3g}, but that of the other parts on the "
                f"same parameters is {rest:.3g}, {rest / norm:.3g} times as large, so {name} has "
                "almost no effect",
                where=name,
                value=rest / norm,
                limit=PARTS,
                remedy="weight the parts so that their gradients start within a factor of ten of "
                "each other.",
            )
    idle = [name for name, own in found.items() if not own]
    if idle:
        yield CHECK.note(
            "loss-parts",
            f"no gradient comes from {several(idle)}, so this part of the loss trains nothing",
            where=idle[0],
            remedy="this is fine for a value that is only logged, and for a part that is inactive "
            "on this batch; otherwise look for .detach() and .item() in the code of this part.",
        )


def _own_and_rest(found: dict[str, dict[str, float]], name: str) -> tuple[float, float]:
    """Returns the gradient norms of a part and of the other parts on the same parameters."""
    own = found[name]
    others = [norms for other, norms in found.items() if other != name]
    rest = math.hypot(*(norms.get(p, 0.0) for norms in others for p in own), 0.0)
    return math.hypot(*own.values(), 0.0), rest


def _is_small_nearby(evidence: Evidence, name: str) -> bool:
    own, rest = _own_and_rest(evidence.part_gradients_nearby, name)
    return not own or not rest / own <= PARTS


@torch.no_grad()
def _sum_over_samples(evidence: Evidence) -> Iterator[Finding]:
    """Detects a summed loss by comparing it with the losses of the batch's two halves."""
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
    except Exception:  # a loss that needs the whole batch cannot be checked
        return
    if not math.isfinite(whole) or first <= 0 or second <= 0:
        return
    if abs(whole / (first + second) - 1) < 1e-3:
        yield CHECK.warning(
            "sum-reduction",
            f"the loss of {2 * half} samples, {whole:.4g}, is the sum of the losses of its halves: "
            "gradients grow with the batch, so the learning rate only fits one batch size",
            value=2 * half,
            limit=1,
            remedy='use reduction="mean", or divide the sum by the number of samples or elements.',
        )


def _part(tree: Any, start: int, end: int) -> Any:
    return tree_map(lambda x: x[start:end] if isinstance(x, Tensor) else x, tree)


def _total(result: Any) -> float:
    return sum(float(part) for part in loss_parts(result).values())
