"""Checks the gradients: whether they exist, are finite, and neither vanish nor explode."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Family, Finding, percent
from fastguard.diagnosis.observe import Values
from fastguard.errors import several

CHECK = Family("backward")

# If at least this share of the trainable elements has no gradient, the finding is an error.
FORGOTTEN = 0.01
TOTAL_NORM_HIGH, TOTAL_NORM_HOPELESS = 1e2, 1e6
PROFILE = 1e4  # largest ratio between the rms gradients of early and late layers
DEEP = 4  # minimum number of weights for comparing early and late layers

_TWICE = (
    "the graph had already been freed. The function passed as step= must return the loss and must "
    "not call backward or optimizer.step, because diagnose calls both. In training, look for a "
    "state (of an RNN or a memory) that is carried over from the previous batch without .detach()."
)


def check(evidence: Evidence) -> Iterator[Finding]:
    """Checks the gradients of the loss, or of the output's mean if there is no loss."""
    evidence = evidence.repaired
    failure = evidence.step.failed("backward")
    if failure is not None:
        yield CHECK.error(
            "backward-raises",
            f"the backward pass raises {failure}",
            remedy=_TWICE
            if "second time" in str(failure.error)
            else "look for in-place changes to tensors that the backward pass needs, and for "
            "operations without a derivative; torch.autograd.set_detect_anomaly(True) shows the "
            "line.",
        )
    if evidence.step.gradients is None:
        return
    yield from _missing(evidence)
    yield from _nonfinite(evidence)
    if evidence.is_finite and not evidence.step.from_output:
        yield from _zero(evidence)
        yield from _sizes(evidence)


def _missing(evidence: Evidence) -> Iterator[Finding]:
    # Parameters of another optimizer, such as the other half of a GAN, need not take part.
    found = evidence.step.gradients or {}
    gradients = {name: found[name] for name in evidence.trained if name in found}
    parameters = evidence.subject.parameters
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if not missing or evidence.is_detached:  # the check of the loss reports a detached loss
        return
    n = sum(parameters[name].numel() for name in gradients)
    share = sum(parameters[name].numel() for name in missing) / max(n, 1)
    start = "the output" if evidence.step.from_output else "the loss"
    yield Finding(
        CHECK,
        "no-gradient",
        "error" if share >= FORGOTTEN else "warning",
        f"{len(missing)} of {len(gradients)} parameters ({percent(share)} of the weights) do not "
        f"contribute to {start} and will not learn: {several(missing, 6)}",
        where=missing[0],
        value=share,
        limit=0,
        remedy="use the output of this module (the loss may ignore a head, or a branch may not be "
        "called), and look for .detach() and torch.no_grad() between this module and the loss. "
        "If the parameter should not be trained, set requires_grad_(False).",
    )


def _nonfinite(evidence: Evidence) -> Iterator[Finding]:
    bad = [name for name, values in evidence.gradients.items() if values.nonfinite]
    # Non-finite gradients of a non-finite loss are not a separate finding.
    step = evidence.step
    if not bad or step.from_output or not all(map(math.isfinite, step.parts.values())):
        return
    report = evidence.explained
    values = evidence.gradients[bad[0]]
    origin = ""
    if report is not None:
        origin = "; first in " + ", ".join(
            text
            for text in (report.operation, report.module, report.evidence, report.source)
            if text
        )
    yield CHECK.error(
        "nonfinite-gradient",
        f"the loss is finite, but {len(bad)} of {len(evidence.gradients)} gradients are not: "
        f"{several(bad)}{origin}",
        where=report.module if report is not None else bad[0],
        value=values.nonfinite / values.numel,
        limit=0,
        remedy=report.remedy
        if report is not None
        else "call fastguard.explain_nonfinite on this batch.",
    )


def _zero(evidence: Evidence) -> Iterator[Finding]:
    trained = _trained(evidence)
    zero = [n for n, values in trained.items() if values.numel and not values.largest]
    if not zero:
        return
    everything = len(zero) == len(trained)
    left_out = any(
        f.problem == "length" and f.is_certain for f in evidence.step.functions.loss_inputs
    )
    # A zero gradient of a bias can be correct: in a Wasserstein critic, the last bias cancels out
    # of the loss.
    matrices = [n for n in zero if evidence.subject.parameters[n].ndim > 1]
    yield Finding(
        CHECK,
        "all-gradients-zero" if everything else "zero-gradient",
        "error" if everything else "warning" if matrices else "note",
        f"{len(zero)} of {len(trained)} gradients are exactly 0: {several(zero)}",
        where="" if everything else zero[0],
        value=len(zero) / len(trained),
        limit=0,
        remedy="make sure that the loss gets samples that it can align; see the finding about the "
        "loss."
        if left_out
        else "look for dead ReLUs, saturated activations, a clamp whose input is always out of "
        "range, a softmax over one class, and later layers whose weights are all 0.",
    )


def _sizes(evidence: Evidence) -> Iterator[Finding]:
    trained = _trained(evidence)
    norm = math.hypot(*(v.rms * math.sqrt(v.numel) for v in trained.values()), 0.0)
    profile = _profile(evidence)
    if norm > TOTAL_NORM_HIGH:
        name, worst = max(trained.items(), key=lambda item: item[1].largest)
        yield Finding(
            CHECK,
            "exploding-gradient",
            "error" if norm > TOTAL_NORM_HOPELESS else "warning",
            f"the gradient norm is {norm:.3g}; the largest element is {worst.largest:.3g}, "
            f"in {name}",
            where=name,
            value=norm,
            limit=TOTAL_NORM_HIGH,
            remedy="clip the gradient with GuardedOptimizer(max_norm=1.0). Then look for large "
            "inputs, a summed loss, a missing normalization layer, or a large gain.",
        )
    if len(profile) < DEEP:
        return
    quarter = len(profile) // 4
    first, last = _mean_rms(profile[:quarter]), _mean_rms(profile[-quarter:])
    for ratio, kind, what in (
        (last / first, "vanishing-gradient", "smaller"),
        (first / last, "exploding-gradient", "larger"),
    ):
        if ratio > PROFILE:
            yield CHECK.warning(
                kind,
                f"over {len(profile)} layers the gradient becomes {ratio:.3g} times {what} in the "
                f"backward pass: its rms is {last:.3g} at {profile[-1][0]}, {first:.3g} at "
                f"{profile[0][0]}",
                where=profile[0][0],
                value=ratio,
                limit=PROFILE,
                remedy="use normalization layers and residual connections between the layers, use "
                "Kaiming or Xavier initialization, and avoid saturating activations in deep "
                "stacks.",
            )


def _trained(evidence: Evidence) -> dict[str, Values]:
    """The gradients of the parameters that the optimizer holds."""
    return {n: v for n, v in evidence.gradients.items() if n in evidence.trained}


def _profile(evidence: Evidence) -> list[tuple[str, Values]]:
    """The gradients of the weights, in the order in which the forward pass used them."""
    order: dict[str, int] = {}
    for i, name in enumerate(evidence.step.called):
        order.setdefault(name.rpartition(" (")[0], i)
    weights = [
        (order[name.rpartition(".")[0]], name, values)
        for name, values in evidence.gradients.items()
        if name.rpartition(".")[0] in order
        and evidence.subject.parameters[name].ndim > 1
        and values.rms
    ]
    return [(name, values) for _, name, values in sorted(weights, key=lambda w: w[0])]


def _mean_rms(profile: list[tuple[str, Values]]) -> float:
    """Geometric mean of the rms gradients."""
    return math.exp(sum(math.log(values.rms) for _, values in profile) / len(profile))
