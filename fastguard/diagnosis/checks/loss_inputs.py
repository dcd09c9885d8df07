"""Reports losses with the wrong kind of input, such as probabilities instead of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.ctc_lengths import REMEDY
from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, Severity
from fastguard.diagnosis.loss_inputs import LossInput

CHECK = Family("loss")

_KINDS = {
    "activated": "activated-twice",
    "twice": "activated-twice",
    "form": "wrong-form",
    "axis": "wrong-axis",
    "swapped": "swapped-arguments",
    "length": "unaligned-targets",
}
_TAKES = {
    "cross_entropy": "log_softmax",
    "binary_cross_entropy_with_logits": "a sigmoid",
    "multilabel_soft_margin_loss": "a sigmoid",
}


def check_loss_inputs(evidence: Evidence) -> Iterator[Finding]:
    """Reports each problem once per function."""
    reported: set[tuple[str, str, str]] = set()
    for found in evidence.step.functions.loss_inputs:
        key = (found.function, found.argument, found.problem)
        if key not in reported:
            reported.add(key)
            yield _finding(found)


def _finding(found: LossInput) -> Finding:
    severity: Severity = "error" if found.is_certain else "warning"
    if found.problem == "twice" or (found.problem == "length" and not found.is_certain):
        severity = "note"
    return Finding(
        CHECK,
        _KINDS[found.problem],
        severity,
        found.seen + _consequence(found),
        where=f"{found.argument} of {found.function}",
        value=found.classes,
        remedy=_remedy(found),
    )


def _consequence(found: LossInput) -> str:
    if found.problem == "twice":
        return ", and applies log_softmax again, which changes nothing"
    if found.problem == "length":
        left = ": no sample has a loss or a gradient" if found.is_certain else ""
        return f"; zero_infinity=True drops them{left}"
    if found.problem != "activated":
        return ""
    if found.function not in _TAKES:
        return ": the activation is applied twice"
    again = f"; it applies {_TAKES[found.function]} itself"
    if found.function == "cross_entropy" and found.classes:
        least = math.log(1 + (found.classes - 1) / math.e)
        return f"{again}, so the loss cannot fall below {least:.3g}"
    return f"{again}, so no predicted probability is below 0.5"


def _remedy(found: LossInput) -> str:
    name = found.function
    if found.problem == "twice":
        return ""
    if found.problem == "length":
        return REMEDY
    if found.problem == "axis":
        return (
            "take the softmax over the class axis, which is dim=1 for (N, C, ...). If the classes "
            "are in the last axis, call output.movedim(-1, 1) first. Softmax without dim= uses "
            "axis 0 of a tensor with 1 or 3 dimensions."
        )
    if name == "kl_div":
        if found.problem == "swapped":
            return (
                "kl_div(log q of the model, p of the target) is KL(p || q): the model's "
                "log-probabilities come first. The current order is right only for KL(q || p)."
            )
        if found.argument == "target":
            return (
                "use log_target=True if the target contains log-probabilities, and "
                "log_target=False if it contains probabilities."
            )
        return "pass log-probabilities: kl_div(output.log_softmax(-1), target)."
    if name in ("nll_loss", "ctc_loss"):
        instead = ", or cross_entropy(logits, target)" if name == "nll_loss" else ""
        return f"pass output.log_softmax(dim) over the classes{instead}."
    if name == "binary_cross_entropy":
        return "use binary_cross_entropy_with_logits, or end the model with a sigmoid."
    if not found.is_certain:
        return "if the model ends with a sigmoid, remove it: this loss expects logits."
    other = ", or use nll_loss(probabilities.log(), target)" if name == "cross_entropy" else ""
    return f"pass the logits: remove the activation from the model during training{other}."
